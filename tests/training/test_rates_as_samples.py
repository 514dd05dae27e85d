"""Films of different rates, extracted by flow.py --fps, are clips of equal duration in training."""

import numpy as np
import pytest
from helpers.containers import encode
from helpers.training import SMALL, log

import flow
import pretrain

PER_SECOND = 100  # grey levels: a frame's value is its time


@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    """Two seconds of film at 30 and at 12 frames a second, and their stores at 6."""
    root = tmp_path_factory.mktemp("rates")
    (root / "v").mkdir()
    for rate in (30, 12):
        frames = [np.full((32, 32, 3), 20 + PER_SECOND * t / rate, np.uint8) for t in range(2 * rate)]
        (root / "v" / f"{rate}.mp4").write_bytes(encode(frames, "mp4", rate=rate))
    assert flow.main(["--videos", str(root / "v"), "--out", str(root / "flow"), "--rgb", str(root / "rgb"), "--fps",
                      "6", "--short-side", "0", "--warps", "1", "--epsilon", "0.1", "--workers", "1"]) == 0
    return root


@pytest.mark.parametrize("inputs", [("--flow", "--videos"), ("--flow", "--videos", "--rgb"), ("--videos", "--rgb")],
                         ids=["videos", "RGB store", "rgb alone"])
def test_clips_of_films_of_different_rates_last_as_long(tiny, rates, tmp_path, inputs):
    where = {"--flow": "flow", "--videos": "v", "--rgb": "rgb"}
    views = [] if "--flow" in inputs else ["--views", "rgb"]
    s = pretrain.arguments([part for flag in inputs for part in (flag, str(rates / where[flag]))] + [
        *views, "--dataset", "folder", "--prototypes", str(tiny.prototypes), "--out", str(tmp_path / "run"), *SMALL,
        "--size", "32", "--frames", "8", "--batch-size", "2", "--epochs", "1", "--warmup-epochs", "0"])
    _, _, videos, clips, _ = pretrain.read_data(s)
    assert {video.name for video in videos} == {"30", "12"}
    for index, video in enumerate(videos):
        item = clips[(0, index)]
        assert not item["fault"]
        for clip in item["long"]["rgb"]:  # [T, S, S, 3]
            lasts = (clip[-1].float().mean() - clip[0].float().mean()).item() / PER_SECOND
            assert lasts == pytest.approx(7 / 6, abs=1 / int(video.name) + 0.05)  # seconds, to a frame of the film
    assert pretrain.train(s) == 0
    first, last = log(tmp_path / "run")
    assert first["videos"] == 2 and last["step"] == 1 and last["skipped"] == 0
    assert first["settings"]["rgb_fps"] == 6  # so that RGB is evaluated at no other rate
