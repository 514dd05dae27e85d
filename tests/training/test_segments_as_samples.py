"""A film cut by flow.py --segment is as many samples of training as it has segments."""

import shutil

import pytest
from helpers.flow import film, moving
from helpers.training import SMALL, log

import flow
import pretrain
from support.errors import BadInput


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """Films of 40 and 20 pairs, their stores in segments of ten."""
    root = tmp_path_factory.mktemp("cut")
    for name, frames in (("long", 41), ("other", 21)):
        film(root / "v" / f"{name}.avi", moving(frames, 40, 40, 1, 0, seed=frames))
    assert flow.main(["--videos", str(root / "v"), "--out", str(root / "flow"), "--rgb", str(root / "rgb"),
                      "--short-side", "0", "--warps", "1", "--epsilon", "0.1", "--segment", "0.4"]) == 0
    return root


def arguments(tiny, out, *inputs):
    return pretrain.arguments(["--dataset", "folder", "--prototypes", str(tiny.prototypes), "--out", str(out), *SMALL,
                               "--batch-size", "3", "--epochs", "1", "--warmup-epochs", "0", *map(str, inputs)])


def test_each_segment_of_a_long_film_is_a_sample(tiny, cut, tmp_path):
    inputs = ["--videos", cut / "v", "--flow", cut / "flow"]
    with pytest.raises(BadInput, match="holds long in segments, whose pictures are read from an RGB store: add --rgb"):
        pretrain.train(arguments(tiny, tmp_path / "run", *inputs))
    assert pretrain.train(arguments(tiny, tmp_path / "run", *inputs, "--rgb", cut / "rgb")) == 0
    first, *lines = log(tmp_path / "run")
    assert first["videos"] == 6
    assert [line["step"] for line in lines] == [1, 2] and lines[-1]["skipped"] == 0


@pytest.mark.parametrize("view", ["rgb", "flow"])
def test_segments_of_one_view(tiny, cut, tmp_path, view):
    """rgb: the videos are listed and the RGB store is read; flow: the flow store alone."""
    if view == "rgb":
        shutil.copytree(cut / "v", tmp_path / "v")
        inputs = ["--videos", tmp_path / "v", "--rgb", cut / "rgb"]
    else:
        inputs = ["--flow", cut / "flow"]
    s = arguments(tiny, tmp_path / "run", *inputs, "--views", view)
    _, _, videos, clips, _ = pretrain.read_data(s)
    for path in (tmp_path / "v").glob("*.avi"):
        path.write_bytes(b"not to be read")
    assert [video.name for video in videos] == ["long@0", "long@10", "long@20", "long@30", "other@0", "other@10"]
    items = [clips[(0, i)] for i in range(6)]
    assert not any(item["fault"] for item in items) and items[0]["long"].keys() == {view, "params"}
    assert pretrain.train(s) == 0
    first, *lines = log(tmp_path / "run")
    assert first["videos"] == 6 and [line["step"] for line in lines] == [1, 2] and lines[-1]["skipped"] == 0
