"""search.py index beside other work: interrupted, of neighbours, of another run; films that change meanwhile."""

import os
import shutil

import pytest
from helpers.indexing import index
from helpers.locks import made_elsewhere

from support import collection_index, locks
from support.collection_index import load_collection
from support.errors import BadInput
from support.features import extract_blocks
from support.locks import only_one

PART = "0123456789abcdef" * 2


def test_interrupted_work_of_other_settings_is_refused(films, rgb_index, tmp_path):
    parts = [shutil.copy(rgb_index, tmp_path / f".i.npz.{PART[k:]}{PART[:k]}.npz") for k in range(2)]
    with pytest.raises(BadInput, match=r"^.*\.i\.npz\.0123.* \(protocol: fast there, goca now\); it is interrupted "
                                       r"work: give those, or another --out, or delete it and the 1 more beside it$"):
        index(films, tmp_path / "i.npz", "--protocol", "goca")
    assert sorted(os.listdir(tmp_path)) == sorted(os.path.basename(part) for part in parts)


def test_parts_are_those_of_this_index_alone(films, rgb_index, tmp_path):
    """Whatever its name: brackets are no pattern, and a longer name is another index's."""
    other = shutil.copy(rgb_index, tmp_path / f".films[1].npz.v2.{PART}.npz")
    assert index(films, tmp_path / "films[1].npz") == 0
    assert len(load_collection(tmp_path / "films[1].npz").files) == 5
    assert sorted(os.listdir(tmp_path)) == [os.path.basename(other), "films[1].npz"]


def test_a_second_run_at_the_same_time_is_refused(films, rgb_index, tmp_path):
    out = shutil.copy(rgb_index, tmp_path / "i.npz")
    with made_elsewhere(out, "search.py index"), pytest.raises(
            BadInput, match=r"another search\.py index is making .*i\.npz: wait for its end"):
        index(films, out)
    assert index(films, out) == 0 and os.listdir(tmp_path) == ["i.npz"]


def test_without_locks_a_sentence_is_all(tmp_path, monkeypatch, capsys):
    def fails(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", fails)
    with only_one(tmp_path / "i.npz", "search.py index"):
        assert "can't be locked (No locks available); see to it that no two runs" in capsys.readouterr().err


def test_films_that_change_meanwhile_are_named(films, tmp_path, monkeypatch, capsys):
    videos = tmp_path / "films"
    shutil.copytree(films / "films", videos)

    def extract_and_change(net, found, *args):
        extract_blocks(net, found, *args)
        os.utime(videos / "a.avi")
        (videos / "b" / "c.avi").unlink(missing_ok=True)

    monkeypatch.setattr(collection_index, "extract_blocks", extract_and_change)
    assert index(films, tmp_path / "i.npz", videos=videos) == 0
    said = capsys.readouterr().out
    for name in ("a", "b/c"):
        assert f"skipped: {videos}/{name}.avi changed or vanished meanwhile; give the same command again" in said
    assert "holds 3 films" in said and "3 made anew" in said and "2 skipped" in said
    for path in [path for path in videos.rglob("*.avi") if path.name != "a.avi"]:
        path.unlink()
    with pytest.raises(BadInput, match=r"none of the films .* can be read; the first: .*a\.avi changed or vanished"):
        index(films, tmp_path / "one.npz", videos=videos)


def test_a_link_to_an_index_stays_one(films, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link.npz").symlink_to(tmp_path / "there" / "i.npz")
    assert index(films, tmp_path / "link.npz") == 0
    assert (tmp_path / "link.npz").is_symlink() and len(load_collection(tmp_path / "there" / "i.npz").files) == 5
