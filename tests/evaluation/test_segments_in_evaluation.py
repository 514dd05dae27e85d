"""Films that flow.py --segment cut: evaluate.py takes each segment as a sample with its film's label."""

import json

import numpy as np
import pytest
import torch
from helpers.evaluation import UNTRAINED
from helpers.flow import film, moving

import data
import evaluate
import flow
from experiments import figures
from support.datasets import Video
from support.errors import BadInput
from support.segments import expand
from support.stores import FlowStore, RgbStore
from support.videos import decode

TRIAL = ["--short-side", "0", "--warps", "1", "--epsilon", "0.1", "--workers", "1"]
NAMES = {"train": ["train/left/one@0", "train/left/one@10", "train/right/two@0", "train/right/two@10",
                   "train/right/two@20"],
         "test": ["test/left/short", "test/right/three@0", "test/right/three@10"]}


def extract(root, *more):
    assert flow.main(["--videos", str(root / "v"), "--out", str(root / "flow"), "--rgb", str(root / "rgb"), *TRIAL,
                      *more]) == 0


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Four films, three of them of more than ten pairs, and their stores in segments of ten."""
    root = tmp_path_factory.mktemp("cut")
    for name, frames, u in (("train/left/one", 21, -1), ("train/right/two", 28, 1), ("test/left/short", 9, -1),
                            ("test/right/three", 21, 1)):
        film(root / "v" / f"{name}.avi", moving(frames, 40, 48, u, 0, seed=frames))
    extract(root, "--segment", "0.4")
    return root


def run(cut, tmp_path, name, *more):
    path = tmp_path / "r.json"
    assert evaluate.evaluate(evaluate.arguments([name, *map(str, more), *UNTRAINED, "--workers", "0", "--json",
                                                 str(path)])) == 0
    return json.loads(path.read_text())


def both(cut):
    return "--videos", cut / "v", "--flow", cut / "flow", "--rgb", cut / "rgb"


def test_each_segment_is_a_sample_with_the_label_of_its_film(cut, tmp_path):
    out = run(cut, tmp_path, "retrieval", *both(cut), "--features", tmp_path / "f")
    for what, subset, labels in (("gallery", "train", [0, 0, 1, 1, 1]), ("queries", "test", [0, 1, 1])):
        assert [v["name"] for v in out[what]] == NAMES[subset] and [v["label"] for v in out[what]] == labels
    assert [v.get("first_frame") for v in out["queries"]] == [None, 0, 10]
    assert out["results"].keys() == {"rgb", "flow", "rgb+flow"} and out["left_out"] == []
    assert out["protocol"]["pictures"] == "of an RGB store, short side 190 px"
    assert len(list((tmp_path / "f").iterdir())) == 2
    with pytest.raises(BadInput, match=r"holds train/left/one in segments, .* read from an RGB store: add --rgb RGB"):
        run(cut, tmp_path, "retrieval", *both(cut)[:4])


@pytest.mark.parametrize("view", ["rgb", "flow"])
def test_segments_of_one_view(cut, tmp_path, view):
    """rgb: the store of pictures and the names of the videos; flow: the flow store alone. Numbers are those of both."""
    inputs = ("--videos", cut / "v", "--rgb", cut / "rgb") if view == "rgb" else ("--flow", cut / "flow")
    out = run(cut, tmp_path, "retrieval", *inputs, "--views", view)
    assert [v["name"] for v in out["gallery"]] == NAMES["train"]
    of_both = run(cut, tmp_path, "retrieval", *both(cut))
    assert out["results"][view] == of_both["results"][view] and out["neighbours"][view] == of_both["neighbours"][view]


def test_the_clips_of_a_segment_are_those_of_a_film_of_its_frames(cut, tmp_path):
    film(tmp_path / "v" / "own.avi", moving(28, 40, 48, 1, 0, seed=28)[10:21])
    extract(tmp_path)
    how = {"frames": 8, "size": 32, "protocol": "goca"}
    expected = data.TestClips([Video(str(tmp_path / "v" / "own.avi"), "own", 0)], FlowStore(tmp_path / "flow"), **how,
                              rgb=RgbStore(tmp_path / "rgb"))[0]
    flows, rgb = FlowStore(cut / "flow"), RgbStore(cut / "rgb")
    segments = expand([Video("no file", "train/right/two", 0)], flows, rgb)
    item = data.TestClips(segments, flows, **how, rgb=rgb)[1]
    assert item.keys() == expected.keys() and not {"fault"} & item.keys()
    assert all(torch.equal(item[k], expected[k]) for k in ("rgb", "flow", "weight"))
    alone = data.TestClips(segments, None, **how, rgb=rgb, views=("rgb",))[1]
    assert torch.equal(alone["rgb"], expected["rgb"])


def test_clips_of_a_store_of_whole_films_are_those_of_the_films(cut, tmp_path):
    """But for its JPEGs."""
    film(tmp_path / "v" / "own.avi", moving(28, 40, 48, 1, 0, seed=28))
    extract(tmp_path)
    videos, flows = [Video(str(tmp_path / "v" / "own.avi"), "own", 0)], FlowStore(tmp_path / "flow")
    plain = data.TestClips(videos, flows, frames=8, size=32)[0]
    stored = data.TestClips(videos, flows, frames=8, size=32, rgb=RgbStore(tmp_path / "rgb"))[0]
    assert torch.equal(plain["flow"], stored["flow"])
    assert 0 < (plain["rgb"].float() - stored["rgb"].float()).abs().mean() < 4


def test_training_on_clips_reads_segments(cut, tmp_path):
    out = run(cut, tmp_path, "linear", *both(cut), "--on", "clips", "--epochs", "1", "--batch-size", "2", "--out",
              tmp_path / "linear", "--views", "rgb+flow")
    assert (out["protocol"]["train"], out["protocol"]["test"]) == (5, 3) and out["left_out"] == []


def test_figures_show_a_frame_of_the_segment(cut):
    long, short = (str(cut / "v" / "test" / name) for name in ("right/three.avi", "left/short.avi"))
    for video, number in (({"path": long, "first_frame": 15}, 15), ({"path": long}, 10), ({"path": short}, 4)):
        assert np.array_equal(figures.frame_of(video), list(decode(video["path"]))[number][..., ::-1])
