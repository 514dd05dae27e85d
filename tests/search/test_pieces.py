"""search.py on long films: pieces, segments of a flow store, their times."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.clips import film
from helpers.evaluation import checkpoint
from helpers.flow import film as moving_film
from helpers.flow import moving
from helpers.indexing import index, query

import data
import flow
import search
from support.collection_index import load_collection, pieces_of
from support.datasets import Video
from support.errors import BadInput
from support.stores import FlowStore
from support.videos import decode


def test_pieces_have_their_times(films, tmp_path, capsys):
    """A film of three films, one after the other; a query of the second finds its second."""
    parts = [list(map(np.ascontiguousarray, decode(str(films / "films" / f"{n}.avi")))) for n in "ae"]
    other = list(decode(str(films / "films" / "b" / "c.avi")))
    film(tmp_path / "films" / "long.avi", parts[0] + other + parts[1], fps=12)
    film(tmp_path / "query.avi", other, fps=12)
    out = tmp_path / "i.npz"
    index(films, out, "--segment", "1", videos=tmp_path / "films")
    assert load_collection(out).spans.tolist() == [[0, 1], [1, 2], [2, 3]]
    found = query(out, tmp_path / "query.avi", tmp_path)
    assert (found[0]["start_s"], found[0]["end_s"]) == (1, 2) and found[0]["similarity"] == pytest.approx(1, abs=1e-5)
    assert found[1]["similarity"] < 1 - 1e-5
    # each piece of a query counts
    film(tmp_path / "two.avi", other + parts[1], fps=12)
    found = query(out, tmp_path / "two.avi", tmp_path)
    assert {r["start_s"] for r in found[:2]} == {1, 2} and found[1]["similarity"] == pytest.approx(1, abs=1e-5)
    assert search.main(["groups", "--index", str(out), "--num", "2", "--json", str(tmp_path / "g.json")]) == 0
    # one that can't be read is named
    whole = (tmp_path / "two.avi").read_bytes()
    (tmp_path / "two.avi").write_bytes(whole[:len(whole) * 2 // 5])
    capsys.readouterr()
    assert query(out, tmp_path / "two.avi", tmp_path)[0]["start_s"] == 1
    assert "not looked up, a piece of the film: " in capsys.readouterr().out
    members = [m for g in json.loads((tmp_path / "g.json").read_text())["groups"] for m in g["members"]]
    assert sorted(members) == [f"{tmp_path}/films/long.avi#t={t},{t + 1}" for t in range(3)]


def test_pieces_of_less_than_two_frames_are_refused(films, tmp_path):
    with pytest.raises(BadInput, match=r"first: .*<\.avi has 25 frames a second, so that pieces of 1e-05 s are less "
                                       r"than two frames; index it with --segment 0\.08 or more"):
        index(films, tmp_path / "i.npz", "--segment", "1e-5")
    assert [p.video.first for p in pieces_of("a.avi", "a", 12, 25.0, 0.08, ())] == [0, 2, 4, 6, 8, 10]
    assert [p.span for p in pieces_of("a.avi", "a", 12, 25.0, 1e308, ())] == [(0, 12 / 25)]


def test_pieces_of_films_whose_flow_is_whole(tiny, tmp_path):
    (tmp_path / "run").mkdir()
    checkpoint(tmp_path / "run")
    out = tmp_path / "i.npz"
    index(tmp_path, out, "--flow", str(tiny.flow), "--segment", "0.24", videos=tiny.videos)
    held = load_collection(out)
    assert len(held.files) == 60 and held.frames[:2].tolist() == [[0, 6], [6, 6]]
    found = query(out, held.paths()[9], tmp_path)
    assert {r["path"] for r in found[:2]} == {held.paths()[9]}
    assert found[1]["similarity"] == pytest.approx(1, abs=1e-5)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A film of 34 frames and one of 8, and their flow in segments of ten pairs."""
    root = tmp_path_factory.mktemp("cut")
    for name, frames in (("long", 34), ("short", 8)):
        moving_film(root / "v" / f"{name}.avi", moving(frames, 40, 48, 1, 0, seed=frames))
    assert flow.main(["--videos", str(root / "v"), "--out", str(root / "flow"), "--short-side", "0", "--warps", "1",
                      "--epsilon", "0.1", "--workers", "1", "--segment", "0.4"]) == 0
    (root / "run").mkdir()
    checkpoint(root / "run")
    return root


def test_segments_of_a_flow_store_are_indexed_with_their_times(cut, tmp_path, capsys):
    out, store = tmp_path / "i.npz", FlowStore(cut / "flow")
    assert index(cut, out, "--flow", str(cut / "flow"), videos=cut / "v") == 0
    held = load_collection(out)
    assert held.header["segment"] == 0.4 and held.files.tolist() == ["long.avi"] * 4 + ["short.avi"]
    assert held.frames.tolist() == [[0, 11], [10, 11], [20, 11], [30, 4], [0, 0]]
    times = [[0, 0.4], [0.4, 0.8], [0.8, 1.2], [1.2, 34 / 25], [0, 8 / 25]]
    assert held.spans.tolist() == [pytest.approx(t) for t in times]
    # features of a segment are those of its frames
    moving_film(tmp_path / "own" / "one.avi", moving(34, 40, 48, 1, 0, seed=34)[10:21])
    header = {k: v for k, v in store.header.items() if k != "segment"}
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow" / "header.json").write_text(json.dumps(header))
    shutil.copy(cut / "flow" / "long@10.avi", tmp_path / "flow" / "one.avi")
    clips = data.TestClips([Video(str(tmp_path / "own" / "one.avi"), "one", -1)], FlowStore(tmp_path / "flow"),
                           protocol="fast", frames=8, size=32)
    piece = data.TestClips([Video(str(cut / "v" / "long.avi"), "long@10", -1, 10, 11)], store, protocol="fast",
                           frames=8, size=32)
    own, cut_out = clips[0], piece[0]
    assert "fault" not in own and "fault" not in cut_out
    assert torch.equal(own["rgb"], cut_out["rgb"])
    assert own["weight"].sum() == pytest.approx(1)
    # a query of the film finds each of its pieces as it is
    found = query(out, cut / "v" / "long.avi", tmp_path, "--k", "5")
    assert [r["similarity"] for r in found[:4]] == pytest.approx([1] * 4, abs=1e-5)
    assert found[4]["path"].endswith("short.avi")
    assert sorted((r["start_s"], r["end_s"]) for r in found[:4]) == [pytest.approx(t, abs=1e-3) for t in times[:4]]
    assert search.main(["page", "--index", str(out), "--out", str(tmp_path / "page")]) == 0
    assert len(list((tmp_path / "page" / "previews").iterdir())) == 5
    assert "pieces of films" in (tmp_path / "page" / "index.html").read_text()
    # a film that is gone is one film, of how many pieces ever
    capsys.readouterr()
    shutil.move(cut / "v" / "long.avi", tmp_path / "long.avi")
    try:
        assert search.main(["page", "--index", str(out), "--out", str(tmp_path / "page")]) == 0
    finally:
        shutil.move(tmp_path / "long.avi", cut / "v" / "long.avi")
    said = capsys.readouterr().out
    assert said.count("long.avi doesn't exist") == 1 and "5 entries, 1 of their films can't be read any more" in said


def test_a_segment_more_is_indexed_and_a_film_without_flow_is_named(cut, tmp_path, capsys):
    shutil.copytree(cut / "flow", tmp_path / "flow")
    shutil.copytree(cut / "v", tmp_path / "v")
    (tmp_path / "flow" / "long@30.avi").rename(tmp_path / "last")
    shutil.copy(cut / "v" / "short.avi", tmp_path / "v" / "other.avi")
    out, how = tmp_path / "i.npz", ("--flow", str(tmp_path / "flow"))
    assert index(cut, out, *how, videos=tmp_path / "v") == 0
    said = capsys.readouterr().out
    assert len(load_collection(out).files) == 4 and "skipped: " in said and "has no flow of other" in said
    (tmp_path / "last").rename(tmp_path / "flow" / "long@30.avi")
    assert index(cut, out, *how, videos=tmp_path / "v") == 0
    assert "1 changed" in capsys.readouterr().out and len(load_collection(out).files) == 5


def test_flow_in_other_segments_or_at_another_rate_is_refused(tiny, films, tmp_path):
    for header, more, words in (({"segment": 5}, ["--segment", "1"], "--segment 5, so those are the pieces; leave out"),
                                ({"segment": 5, "fps": 8}, [], "--fps 8, and an index of pieces needs"),
                                ({"fps": 8}, ["--segment", "1"], "--fps 8, and an index of pieces needs")):
        (tmp_path / "header.json").write_text(json.dumps({**FlowStore(tiny.flow).header, **header}))
        with pytest.raises(BadInput, match=words):
            index(films, tmp_path / "i.npz", "--flow", str(tmp_path), *more)
