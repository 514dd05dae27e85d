"""A film cut by flow.py --segment is as many samples of training as it has segments."""

import pytest
from helpers.flow import film, moving
from helpers.training import SMALL, log

import flow
import pretrain
from support.errors import BadInput


def test_each_segment_of_a_long_film_is_a_sample(tiny, tmp_path):
    for name, frames in (("long", 41), ("other", 21)):
        film(tmp_path / "v" / f"{name}.avi", moving(frames, 40, 40, 1, 0, seed=frames))
    store = ["--videos", str(tmp_path / "v"), "--out", str(tmp_path / "flow")]
    assert flow.main([*store, "--rgb", str(tmp_path / "rgb"), "--short-side", "0", "--warps", "1", "--epsilon", "0.1",
                      "--segment", "0.4"]) == 0
    common = ["--dataset", "folder", "--videos", str(tmp_path / "v"), "--flow", str(tmp_path / "flow"), "--prototypes",
              str(tiny.prototypes), "--out", str(tmp_path / "run"), *SMALL, "--batch-size", "3", "--epochs", "1",
              "--warmup-epochs", "0"]
    with pytest.raises(BadInput, match="holds long in segments, whose pictures are read from an RGB store: add --rgb"):
        pretrain.train(pretrain.arguments(common))
    assert pretrain.train(pretrain.arguments([*common, "--rgb", str(tmp_path / "rgb")])) == 0
    first, *lines = log(tmp_path / "run")
    assert first["videos"] == 6  # 40 and 20 pairs in tens
    assert [line["step"] for line in lines] == [1, 2] and lines[-1]["skipped"] == 0
