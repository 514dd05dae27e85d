"""search.py: what an index holds and when it is made anew, neighbours, groups, the page, bad input."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.evaluation import checkpoint, in_two_processes
from helpers.indexing import NAMES, index, made_up, query
from helpers.pages import embedded

import data
import search
from support import collection_index
from support.collection_index import check_header, entries_of, load_collection
from support.datasets import Video
from support.errors import BadInput
from support.features import BLOCK, extract_blocks
from support.grouping import make_groups
from support.inference import to_input
from support.stores import FlowStore
from support.weights import export


@pytest.fixture
def extracted(monkeypatch):
    """The names of the films of each extraction."""
    calls = []

    def recorded(net, videos, *args):
        calls.append(sorted(v.name for v in videos))
        return extract_blocks(net, videos, *args)

    monkeypatch.setattr(collection_index, "extract_blocks", recorded)
    return calls


# --- index -----------------------------------------------------------------------------------------------------------
def test_an_index_holds_each_film_s_mean_feature(films, rgb_index):
    """By hand: unit features of the test views, their weighted mean, unit length; NumPy reads it without pickle."""
    with np.load(rgb_index, allow_pickle=False) as f:
        rows, files, header = f["rgb"], f["files"].tolist(), json.loads(str(f["header"]))
        assert f["spans"].tolist() == [[0, 12 / 25]] * 5
    assert files == sorted(f"{n}.avi" for n in NAMES) and header["views"] == ["rgb"]
    assert (header["protocol"], header["flow"], header["size"]) == ("fast", None, 16)
    net, _ = collection_index.open_network([str(films / "run")])
    videos = [Video(str(films / "films" / file), file, -1) for file in files]
    clips = data.TestClips(videos, None, views=("rgb",), protocol="fast", frames=4, size=16)
    for i, row in enumerate(rows):
        with torch.inference_mode():
            each = F.normalize(net.features("rgb", to_input("rgb", clips[i]["rgb"], torch.device("cpu"))), dim=1)
        expected = F.normalize((each * clips[i]["weight"][:, None]).sum(0), dim=0)
        torch.testing.assert_close(torch.from_numpy(row), expected, rtol=0, atol=1e-5)
    assert (rows @ rows.T)[~np.eye(5, dtype=bool)].max() < 1 - 1e-5  # they differ


def test_only_new_and_changed_films_are_read(films, tmp_path, capsys, extracted):
    videos, out = tmp_path / "films", tmp_path / "i.npz"
    shutil.copytree(films / "films", videos)
    index(films, out, videos=videos)
    index(films, out, videos=videos)
    assert extracted == [sorted(NAMES)] and "0 new, 0 changed, 5 as before, 0 gone" in capsys.readouterr().out
    before = load_collection(out)
    shutil.copy(videos / "e.avi", videos / "new.avi")
    shutil.copy(videos / "e.avi", videos / "a.avi")
    (videos / "b" / "d.avi").unlink()
    index(films, out, videos=videos)
    assert extracted[1:] == [["a", "new"]] and "1 new, 1 changed, 3 as before, 1 gone" in capsys.readouterr().out
    rows = dict(zip(load_collection(out).files.tolist(), load_collection(out).values["rgb"], strict=True))
    assert set(rows) == {"a.avi", "new.avi", "e.avi", "b/c.avi", "<script>alert(1)<.avi"}
    np.testing.assert_allclose(rows["a.avi"], rows["e.avi"], atol=1e-5)
    assert np.array_equal(rows["b/c.avi"], before.values["rgb"][before.files.tolist().index("b/c.avi")])


def test_interrupted_it_goes_on(films, rgb_index, tmp_path, monkeypatch, extracted):
    monkeypatch.setattr(collection_index, "BLOCK", 2)
    monkeypatch.setattr("support.features.BLOCK", 2)
    save, out = collection_index.save_collection, tmp_path / "i.npz"

    def save_one(path, collection):
        save(path, collection)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(collection_index, "save_collection", save_one)
        with pytest.raises(KeyboardInterrupt):
            index(films, out)
    assert not out.exists() and len(os.listdir(tmp_path)) == 1
    index(films, out)
    assert [len(names) for names in extracted] == [5, 3] and os.listdir(tmp_path) == ["i.npz"]
    one, other = load_collection(rgb_index), load_collection(out)
    assert one.files.tolist() == other.files.tolist()
    np.testing.assert_allclose(one.values["rgb"], other.values["rgb"], atol=1e-5)


def test_two_processes_share_the_work(films, rgb_index, forked, tmp_path):
    videos = tmp_path / "films"
    for k in range(BLOCK // 5 + 1):
        shutil.copytree(films / "films", videos / str(k))
    said = in_two_processes(forked, tmp_path / "said", "search", "index", "--checkpoint", films / "run", "--videos",
                            videos, "--out", tmp_path / "i.npz", "--workers", "0")
    assert said.count("2 process(es)") == 1 and os.listdir(tmp_path).count("i.npz") == 1
    one, many = load_collection(rgb_index), load_collection(tmp_path / "i.npz")
    assert len(many.files) == 5 * (BLOCK // 5 + 1) > BLOCK
    row = dict(zip(one.files.tolist(), one.values["rgb"], strict=True))
    for file, x in zip(many.files.tolist(), many.values["rgb"], strict=True):
        np.testing.assert_allclose(x, row[file.split("/", 1)[1]], atol=1e-5)


def test_other_weights_and_settings_are_refused(films, rgb_index, tmp_path):
    out = shutil.copy(rgb_index, tmp_path / "i.npz")
    (tmp_path / "run").mkdir()
    checkpoint(tmp_path / "run", seed=1)
    for more, what in (((), "weights"), (("--protocol", "goca"), "protocol: fast there, goca now"),
                       (("--segment", "0.2"), "segment: none there, 0.2 now"),
                       (("--stride", "2"), "stride: 1 there, 2 now")):
        with pytest.raises(BadInput, match=f"made with other weights or settings .*{what}.*; give those, or another"):
            index(films, out, *more, checkpoint=None if more else tmp_path / "run")
    held = load_collection(out).header
    with pytest.raises(BadInput, match=r"\(views: rgb there, rgb and flow now\); give those"):
        check_header(out, held, {**held, "views": ["rgb", "flow"], "weights": "x", "flow": {"method": "DIS"}},
                     "give those")
    assert Path(out).read_bytes() == rgb_index.read_bytes()
    with pytest.raises(BadInput, match=r"is of other weights than .*run holds now; index the films anew"):
        search.main(["query", "--index", str(out), str(films / "films" / "a.avi"), "--checkpoint",
                     str(tmp_path / "run")])


def test_films_that_cannot_be_read_are_counted_and_named(films, tmp_path, capsys):
    videos = tmp_path / "films"
    videos.mkdir()
    shutil.copy(films / "films" / "a.avi", videos / "good.avi")
    (videos / "empty.avi").touch()
    (videos / "text.mp4").write_text("no film")
    (videos / "a.xyz").touch()
    assert index(films, tmp_path / "i.npz", videos=videos) == 0
    said = capsys.readouterr().out
    assert "passed over: 1 files" in said and ".xyz 1" in said
    assert "skipped: " in said and "empty.avi is empty" in said and "text.mp4 holds no frame" in said
    assert "holds 1 films by rgb" in said and "2 skipped" in said
    (videos / "good.avi").unlink()
    with pytest.raises(BadInput, match=r"none of the films below .* can be read; the first: .*empty.avi is empty"):
        index(films, tmp_path / "j.npz", videos=videos)
    assert not (tmp_path / "j.npz").exists()


def test_where_no_film_can_be_read_any_more_the_index_stays(films, tmp_path):
    videos = tmp_path / "films"
    videos.mkdir()
    shutil.copy(films / "films" / "a.avi", videos / "a.avi")
    index(films, tmp_path / "i.npz", videos=videos)
    before = (tmp_path / "i.npz").read_bytes()
    (videos / "a.avi").write_text("no film")
    with pytest.raises(BadInput, match=r"none of the films below .* can be read"):
        index(films, tmp_path / "i.npz", videos=videos)
    assert (tmp_path / "i.npz").read_bytes() == before


def test_an_export_and_its_run_give_one_index(films, rgb_index, tmp_path):
    export(films / "run", tmp_path / "backbones.pt")
    index(films, tmp_path / "i.npz", checkpoint=tmp_path / "backbones.pt")
    assert np.array_equal(load_collection(rgb_index).values["rgb"], load_collection(tmp_path / "i.npz").values["rgb"])


def test_a_path_with_an_equals_sign_is_kept_whole():
    here = os.getcwd()
    for given, kept in (("rgb=runs/lr=0.1/goca.pt", f"rgb={here}/runs/lr=0.1/goca.pt"),
                        ("runs/lr=0.1/goca.pt", f"{here}/runs/lr=0.1/goca.pt")):
        assert collection_index._absolute(given) == kept


# --- query -----------------------------------------------------------------------------------------------------------
def test_the_nearest_of_a_film_from_elsewhere(films, rgb_index, tmp_path, capsys):
    """A copy of a film of the index, which comes first; the rest by their inner products with it."""
    copy = shutil.copy(films / "films" / "b" / "c.avi", tmp_path / "copy.avi")
    found = query(rgb_index, copy, tmp_path)
    held = load_collection(rgb_index)
    rows = held.values["rgb"].astype(np.float64)
    cosine = rows @ rows[held.files.tolist().index("b/c.avi")]
    order = np.argsort(-cosine)
    assert [r["path"] for r in found] == [str(films / "films" / held.files[i]) for i in order]
    assert [r["similarity"] for r in found] == pytest.approx(cosine[order], abs=2e-6)
    assert {(r["start_s"], r["end_s"]) for r in found} == {(0, 0.48)}
    said = capsys.readouterr().out
    assert re.search(r"rgb, 5 entries: .*decoding \d.*network \d.*search \d", said)
    assert f"--k 10 is more than the 5 entries of {rgb_index}; all are given" in said
    assert len(query(rgb_index, copy, tmp_path, "--k", "2")) == 2
    assert "is more than" not in capsys.readouterr().out


def test_flow_of_the_query_is_made_as_that_of_the_index(tiny, tmp_path, capsys):
    """Of a film from elsewhere; by both views, and by RGB alone, for which none is made."""
    (tmp_path / "run").mkdir()
    checkpoint(tmp_path / "run", flow_header=FlowStore(tiny.flow).header)
    out, more = tmp_path / "i.npz", ["--flow", str(tiny.flow)]
    index(tmp_path, out, *more, videos=tiny.videos)
    assert load_collection(out).header["views"] == ["rgb", "flow"] and len(load_collection(out).files) == 30
    first = load_collection(out).paths()[7]
    copy = shutil.copy(first, tmp_path / "copy.avi")
    for view in ("rgb+flow", "flow", "rgb"):
        capsys.readouterr()
        found = query(out, copy, tmp_path, "--view", view)
        assert found[0]["path"] == first and found[0]["similarity"] == pytest.approx(1, abs=1e-5)
        assert found[1]["similarity"] < 1 - 1e-5
        assert ("flow 0." in capsys.readouterr().out) == (view != "rgb")
    x = load_collection(out).values
    both = x["rgb"] + x["flow"]
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    expected = np.sort(both @ both[7])[::-1][:10]
    assert [r["similarity"] for r in query(out, copy, tmp_path)] == pytest.approx(expected, abs=1e-5)


def test_a_film_of_the_index_has_its_features_there(tiny, tmp_path, capsys, monkeypatch):
    """Whole or in pieces, by another path, too; one that has changed is read."""
    (tmp_path / "run").mkdir()
    checkpoint(tmp_path / "run", flow_header=FlowStore(tiny.flow).header)
    shutil.copytree(tiny.videos, tmp_path / "films")
    (tmp_path / "link").symlink_to(tmp_path / "films")
    for k, more in enumerate(([], ["--segment", "0.2"])):
        out = tmp_path / f"{k}.npz"
        index(tmp_path, out, "--flow", str(tiny.flow), *more, videos=tmp_path / "films")
        film = load_collection(out).paths()[7]
        other = os.path.join(tmp_path / "link", os.path.relpath(film, tmp_path / "films"))
        anew = query(out, shutil.copy(film, tmp_path / "copy.avi"), tmp_path)
        assert "network" in capsys.readouterr().out
        with monkeypatch.context() as m:
            m.setattr(search, "open_network", lambda *a, **k: pytest.fail("the network was loaded"))
            for path in (film, other):
                held = query(out, path, tmp_path)
                assert "the film is in the index: " in capsys.readouterr().out
                assert [r["path"] for r in held[:3]] == [r["path"] for r in anew[:3]]
                assert [r["similarity"] for r in held] == pytest.approx([r["similarity"] for r in anew], abs=1e-4)
    held, n = load_collection(out), len(load_collection(out).files)
    own = entries_of(held, film)
    assert len(own) == 2 and entries_of(held.take([i for i in range(n) if i != own[0]]), film) == []  # lacks a piece
    os.utime(film, (1, 1))
    assert query(out, film, tmp_path)[0]["similarity"] == pytest.approx(1, abs=1e-4)
    assert "the film is in the index: " not in capsys.readouterr().out


# --- groups ----------------------------------------------------------------------------------------------------------
def test_groups_of_three_directions(tmp_path, capsys):
    """Ten, eight and two rows about three axes: the groups, the nearest to each centre, how tight, how sure."""
    rng = np.random.default_rng(0)
    x = np.repeat(np.eye(3), [10, 8, 2], axis=0) + 0.1 * rng.standard_normal((20, 3))
    x[15:18] = np.eye(3)[1] + 0.2 * rng.standard_normal((3, 3))
    path = made_up(tmp_path / "i.npz", {"rgb": x})
    assert search.main(["groups", "--index", str(path), "--num", "3", "--json", str(tmp_path / "g.json")]) == 0
    out = json.loads((tmp_path / "g.json").read_text())
    assert [g["size"] for g in out["groups"]] == [10, 8, 2] and out["agreement"] == 1 and out["silhouette"] > 0.5
    unit = load_collection(path).values["rgb"]
    for g, at in zip(out["groups"], (range(10), range(10, 18), range(18, 20)), strict=True):
        rows = unit[list(at)]
        centre = rows.mean(0) / np.linalg.norm(rows.mean(0))
        assert g["members"] == [f"/films/{at[i]:04d}.avi" for i in np.argsort(-(rows @ centre), kind="stable")]
        assert g["typical"] == g["members"][:5] and g["tightness"] == pytest.approx((rows @ centre).mean(), abs=1e-5)
    assert out["groups"][1]["tightness"] < out["groups"][0]["tightness"]
    said = capsys.readouterr().out
    assert "group 1: 10, mean cosine with its centre 0.9" in said and "20 starts agree by 1.00" in said


def test_starts_that_disagree_say_so(tmp_path):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((200, 64), np.float32))
    found = make_groups(F.normalize(x, dim=1), 10)
    assert found.agreement < 0.5 and abs(found.silhouette) < 0.1 and sum(map(len, found.members)) == 200


# --- page ------------------------------------------------------------------------------------------------------------
def test_the_page_of_a_collection(films, rgb_index, tmp_path, capsys):
    """Its films, groups as `groups` has them, a map, previews; once films have moved, the same with their names."""
    videos, out = tmp_path / "films", tmp_path / "page"
    shutil.copytree(films / "films", videos)
    index(films, tmp_path / "i.npz", videos=videos)
    command = ["page", "--index", str(tmp_path / "i.npz"), "--out", str(out), "--num", "2"]
    assert search.main(command) == 0
    found, text = embedded(out / "index.html"), (out / "index.html").read_text()
    held = load_collection(tmp_path / "i.npz")
    assert [f["name"] for f in found["films"]] == held.files.tolist() and found["views"] == ["rgb"]
    assert "<script>alert" not in text
    assert all((out / "previews" / f["strip"][0]).is_file() and f["end"] is None for f in found["films"])
    assert len(found["maps"]["rgb"]) == 5
    assert [g["members"] for g in found["groups"]["rgb"]] == make_groups(search.matrix(held, "rgb"), 2).members
    assert "0 of their films can't be read any more" in capsys.readouterr().out
    videos.rename(tmp_path / "elsewhere")
    assert search.main(command) == 0
    moved = embedded(out / "index.html")
    said = capsys.readouterr().out
    assert [f["strip"] for f in moved["films"]] == [f["strip"] for f in found["films"]]
    assert all("doesn't exist" in f["missing"] for f in moved["films"])
    assert said.count("doesn't exist") == 5 and "5 of their films can't be read any more; index" in said


# --- bad input -------------------------------------------------------------------------------------------------------
def test_bad_input(films, rgb_index, tmp_path):
    one = made_up(tmp_path / "one.npz", {"rgb": np.ones((1, 4))})
    five = made_up(tmp_path / "five.npz", {"rgb": np.random.default_rng(0).standard_normal((5, 4))})
    none = made_up(tmp_path / "none.npz", {"rgb": np.ones((0, 4))})
    (tmp_path / "damaged.npz").write_bytes(five.read_bytes()[:300])
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    (tmp_path / "empty.avi").touch()
    (tmp_path / "text.avi").write_text("text")
    video = str(films / "films" / "a.avi")
    for command, message in (
            (["groups", "--index", one, "--num", "1"], "one.npz holds one entry, and groups need two"),
            (["groups", "--index", none, "--num", "1"], "none.npz holds no film; delete it, and index some"),
            (["groups", "--index", five, "--num", "6"], "--num 6 is more than the 5 entries of .*five.npz; choose 2"),
            (["groups", "--index", five, "--num", "2", "--view", "flow"], "--view flow: .* holds rgb only; index the "
                                                                          "films with --flow"),
            (["groups", "--index", tmp_path / "no.npz", "--num", "2"], "no.npz doesn't exist; make it with: python "
                                                                       "search.py index"),
            (["groups", "--index", tmp_path / "damaged.npz", "--num", "2"], "damaged.npz is damaged"),
            (["query", "--index", tmp_path / "other.npz", video], "other.npz is damaged or no index of a collection"),
            (["query", "--index", rgb_index, tmp_path / "empty.avi"], "empty.avi is empty"),
            (["query", "--index", rgb_index, tmp_path / "text.avi"], "text.avi holds no frame"),
            (["query", "--index", rgb_index, tmp_path / "none.avi"], "none.avi doesn't exist"),
            (["query", "--index", rgb_index, films / "films"], "films is a folder, and not one of images alone"),
            (["query", "--index", rgb_index, video, "--checkpoint", tmp_path / "gone"], "gone doesn't exist"),
            (["index", "--checkpoint", films / "run", "--videos", tmp_path / "gone", "--out", tmp_path / "x.npz"],
             "gone is no folder"),
            (["index", "--checkpoint", films / "run", "--videos", films / "films", "--views", "flow", "--out",
              tmp_path / "x.npz"], "flow needs --flow")):
        with pytest.raises(BadInput, match=message):
            search.main([str(c) for c in command])


def test_a_query_of_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def refuses(path):
        raise PermissionError

    monkeypatch.setattr(os, "scandir", refuses)
    with pytest.raises(BadInput, match=f"^{tmp_path} can't be read; its rights forbid it"):
        search.main(["query", "--index", "x.npz", str(tmp_path)])


def test_numbers_that_no_library_takes_are_refused(capsys):
    for command, flag, value, words in (
            (["groups", "--num", "2", "--index", "x.npz"], "--seed", 2**70, r"a whole number from 0 to 2\^32 - 1"),
            (["page", "--out", "p", "--index", "x.npz"], "--seed", -1, "a whole number from 0 to"),
            (["query", "film.avi", "--index", "x.npz"], "--batch-views", 2**70, r"below 2\^31")):
        with pytest.raises(SystemExit):
            search.main([*command, flag, str(value)])
        assert re.search(f"{flag}: {value} must be {words}", capsys.readouterr().err)


def test_a_query_of_one_film_gives_that_one(films, tmp_path, capsys):
    (tmp_path / "films").mkdir()
    shutil.copy(films / "films" / "a.avi", tmp_path / "films" / "a.avi")
    index(films, tmp_path / "i.npz", videos=tmp_path / "films")
    found = query(tmp_path / "i.npz", films / "films" / "e.avi", tmp_path)
    assert [r["path"] for r in found] == [str(tmp_path / "films" / "a.avi")]
    assert "--k 10 is more than the 1 entry of" in capsys.readouterr().out
    assert search.main(["page", "--index", str(tmp_path / "i.npz"), "--out", str(tmp_path / "p"), "--num", "3"]) == 0
    assert "--num 3 is more than the 1 entry of" in capsys.readouterr().out
    assert embedded(tmp_path / "p" / "index.html")["groups"] == {}
