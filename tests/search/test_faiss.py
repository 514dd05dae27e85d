"""The search by FAISS, where that is installed, and without it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.indexing import made_up, query
from helpers.paths import ROOT

import search
from support import approximate
from support.collection_index import load_collection
from support.metrics import nearest


def unit_rows(n, dim, seed=0):
    rng = np.random.default_rng(seed)
    return F.normalize(torch.from_numpy(rng.standard_normal((n, dim), np.float32)), dim=1)


def test_of_several_pieces_the_best_similarity_counts():
    x, q = unit_rows(500, 16), unit_rows(3, 16, seed=1)
    values, places = search.best(q, x, 20, lambda k: nearest(q, x, k))
    everything = (x @ q.T).max(1).values.topk(20)
    torch.testing.assert_close(values, everything.values)
    assert torch.equal(places, everything.indices)


def test_faiss_finds_what_it_says_and_is_kept(films, rgb_index, tmp_path, capsys):
    """On 3000 rows an inverted file, which finds 95 % of the nearest; on five films all."""
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    x, q = unit_rows(3000, 8), unit_rows(100, 8, seed=1)
    index, recall = approximate.build(x)
    near = torch.from_numpy(index.search(q.numpy(), 10)[1])
    found = (near[:, :, None] == nearest(q, x, 10)[:, None]).any(2).double().mean()
    assert 0.95 <= recall and 0.9 < found and index.nlist == 76 and index.nprobe < 76

    path, film = shutil.copy(rgb_index, tmp_path / "i.npz"), films / "films" / "a.avi"
    exact = query(path, film, tmp_path)
    assert query(path, film, tmp_path, "--engine", "faiss") == exact
    assert "finds 100 % of the ten nearest" in capsys.readouterr().out
    made, = tmp_path.glob("i.npz.rgb.*.faiss")
    stamp = made.stat().st_mtime_ns
    assert query(path, film, tmp_path, "--engine", "faiss") == exact and made.stat().st_mtime_ns == stamp
    os.utime(path)  # another state of the collection
    assert query(path, film, tmp_path, "--engine", "faiss") == exact
    again, = tmp_path.glob("i.npz.rgb.*.faiss")
    assert again != made
    again.write_bytes(again.read_bytes()[:60])  # cut short
    assert query(path, film, tmp_path, "--engine", "faiss") == exact and again.stat().st_size > 60
    again.unlink()
    again.mkdir()  # where it can't be kept, the search goes on
    capsys.readouterr()
    assert query(path, film, tmp_path, "--engine", "faiss") == exact and "is not kept: " in capsys.readouterr().out


def test_of_faiss_s_indexes_the_last_is_kept_whatever_the_name(tmp_path, monkeypatch):
    """Brackets are no pattern, and a longer name is another index's; without FAISS."""
    def not_there(path):
        raise RuntimeError

    monkeypatch.setitem(sys.modules, "faiss", SimpleNamespace(
        read_index=not_there, write_index=lambda index, path: Path(path).write_text(index)))
    monkeypatch.setattr(approximate, "build", lambda rows: ("index", 1.0))
    (tmp_path / "i[1].npz").touch()
    for name in ("i[1].npz.rgb.1.faiss", "i[1].npz.rgb.rgb.1.faiss"):
        (tmp_path / name).touch()
    _, message = approximate.kept(tmp_path / "i[1].npz", "rgb", None)
    made = f"i[1].npz.rgb.{os.stat(tmp_path / 'i[1].npz').st_mtime_ns}.faiss"
    assert message.startswith(f"written: {tmp_path / made}")
    assert sorted(os.listdir(tmp_path)) == ["i[1].npz", made, "i[1].npz.rgb.rgb.1.faiss"]


def test_without_faiss_the_search_is_exact(films, rgb_index, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(approximate, "installed", lambda: False)
    film = films / "films" / "a.avi"
    assert query(rgb_index, film, tmp_path, "--engine", "faiss")[0]["path"] == str(film)
    assert "FAISS is not installed" in capsys.readouterr().out


def test_the_lines_of_the_documentation_hand_an_index_to_faiss(tmp_path, capsys):
    pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    rng = np.random.default_rng(0)
    made_up(tmp_path / "films.npz", {"rgb": rng.standard_normal((300, 24))})
    lines = re.search(r"```py\n(.*?)```", (ROOT / "docs" / "search.md").read_text(), re.DOTALL)[1]
    assert len(lines.splitlines()) <= 10
    done = subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    x = load_collection(tmp_path / "films.npz").values["rgb"]
    nearest = np.argsort(-(x @ x[0]))[:5]
    assert [f"/films/{i:04d}.avi" for i in nearest] == re.findall(r"/films/\d+\.avi", done.stdout)
