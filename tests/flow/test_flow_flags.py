"""Each flag of flow.py reaches what it names, and the backend is chosen by what agrees."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.containers import encode
from helpers.flow import built, command, film, make_set, moving

import flow
import goca
from support import flow_gpu, flow_methods
from support.errors import BadInput
from support.flow_pipeline import cut_short_message
from support.stores import FlowStore, RgbStore

TRIAL = ["--warps", "1", "--epsilon", "0.1"]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("films"), 2)


@pytest.mark.parametrize("more", [[], ["--batch", "8"]], ids=["processes", "batches"])
@pytest.mark.parametrize(("quality", "step"), [(50, 16), (95, 2)])
def test_quality_is_that_of_the_jpegs(films, tmp_path, more, quality, step):
    """Their first quantiser: 16 in the standard's table, which is that of 50; a tenth of it at 95."""
    assert command(films, tmp_path / "s", *TRIAL, *more, "--quality", str(quality)) == 0
    for path in (tmp_path / "s").rglob("*.avi"):
        tables = path.read_bytes().split(b"\xff\xdb\x00\x43\x00")[1:]
        assert [table[0] for table in tables] == [step] * 3


@pytest.mark.parametrize(("more", "module", "place"), [([], flow, 4), (["--batch", "8"], flow_gpu, 4)],
                         ids=["processes", "batches"])
def test_the_time_limit_and_the_workers_reach_the_processes(films, tmp_path, monkeypatch, more, module, place):
    seen = []
    monkeypatch.setattr(module, "run_in_processes", lambda *args: seen.append(args) or iter(()))
    assert command(films, tmp_path / "s", *TRIAL, *more, "--time-limit", "77", "--workers", "3") == 0
    (args,) = seen
    assert args[place] == 77 and args[3] == 3 and args[1].keys() == {("a/v0", 0), ("a/v1", 0)}


@built
def test_a_store_goes_on_with_the_backend_it_began_with(films, tmp_path):
    assert command(films, tmp_path / "s", *TRIAL, "--backend", "opencv") == 0
    (tmp_path / "s" / "a" / "v1.avi").unlink()
    assert command(films, tmp_path / "s", *TRIAL) == 0
    store = FlowStore(tmp_path / "s")
    assert store.header["backend"] == "opencv" and "a/v1" in store
    assert command(films, tmp_path / "new", *TRIAL) == 0
    assert FlowStore(tmp_path / "new").header["backend"] == "goca"


def test_each_shard_lists_what_it_skipped_and_a_whole_run_lists_all(tmp_path):
    for k in range(4):
        film(tmp_path / "v" / f"{k}.avi", moving(2 if k < 2 else 1, 16, 16, 1, 0))  # 2 and 3 have one frame only

    def listings():
        return {p.name: json.loads(p.read_text())["skipped"].keys() for p in (tmp_path / "s").glob("skipped*.json")}

    for i in (1, 2):
        assert command(tmp_path / "v", tmp_path / "s", *TRIAL, "--shard", f"{i}/2", "--workers", "1") == 0
    assert listings() == {"skipped-1-of-2.json": {"2"}, "skipped-2-of-2.json": {"3"}}
    film(tmp_path / "v" / "2.avi", moving(2, 16, 16, 1, 0))
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL, "--shard", "1/2", "--workers", "1") == 0
    assert listings() == {"skipped-2-of-2.json": {"3"}}
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL, "--workers", "1") == 0
    assert listings() == {"skipped.json": {"3"}}


@pytest.mark.parametrize(("frames", "short"), [(94, True), (95, False), (96, False), (100, False), (101, False)])
def test_a_twentieth_of_the_declared_frames_may_lack(frames, short):
    said = cut_short_message("x.avi", {"source_frames": frames, "source_declared": 100})
    assert said == (f"x.avi is cut short: {frames} of 100 frames decode" if short else None)


# --- frames at a rate ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def rates(tmp_path_factory):
    """Two seconds of film at 30 and at 12 frames a second, whose grey values are their times: 100 a second."""
    root = tmp_path_factory.mktemp("rates")
    for rate in (30, 12):
        frames = [np.full((32, 32, 3), 20 + 100 * t / rate, np.uint8) for t in range(2 * rate)]
        (root / f"{rate}.mp4").write_bytes(encode(frames, "mp4", rate=rate))
    return root


@pytest.mark.parametrize("more", [[], ["--batch", "8"]], ids=["processes", "batches"])
def test_frames_come_at_the_rate_asked_for(rates, tmp_path, more):
    """By their times: of both films 12 frames in two seconds, which show the same moments to a frame of theirs."""
    assert command(rates, tmp_path / "s", "--rgb", str(tmp_path / "r"), *TRIAL, *more, "--fps", "6") == 0
    flows, rgb = FlowStore(tmp_path / "s"), RgbStore(tmp_path / "r")
    assert flows.header["fps"] == rgb.header["fps"] == 6
    for rate in (30, 12):
        assert len(flows.open(str(rate))) == 11
        header = flows.open(str(rate)).header
        assert header["fps"] == 6  # from which clips know at what rate to decode
        assert (header["source_fps"], header["source_frames"], header["source_declared"]) == (rate, 12, 12)
        shown = [frame.mean() for frame in rgb.open(str(rate)).frames(range(12))]
        assert np.abs(np.array(shown) - (20 + 100 / 6 * np.arange(12))).max() <= 100 / rate + 3
    with pytest.raises(BadInput, match=r"other settings \(fps is 6\.0 there and None now\)"):
        command(rates, tmp_path / "s", *TRIAL)
    with pytest.raises(BadInput, match="--fps takes 0 to 240, not -1"):
        command(rates, tmp_path / "s", *TRIAL, "--fps", "-1")


def test_segments_last_as_long_at_any_rate(rates, tmp_path):
    """Half a second: 3 pairs at 6 frames a second, 15 and 6 as stored."""
    assert command(rates, tmp_path / "s", *TRIAL, "--fps", "6", "--segment", "0.5") == 0
    assert command(rates, tmp_path / "t", *TRIAL, "--segment", "0.5") == 0
    for root, pairs in (("s", {"30": 3, "12": 3}), ("t", {"30": 15, "12": 6})):
        store = FlowStore(tmp_path / root)
        for name, count in pairs.items():
            names = store.segments(name)
            assert len(names) == 4 and [len(store.open(n)) for n in names] == [count] * 3 + [count - 1]


# --- backends --------------------------------------------------------------------------------------------------------
def test_two_flows_agree_to_a_fiftieth_of_a_pixel():
    flow_of = torch.randn(1, 2, 8, 8)
    for distance, same in ((0.0, True), (0.015, True), (0.025, False)):
        shift = torch.tensor([0.6, -0.8])[None, :, None, None] * distance
        assert flow_methods.same_flow(flow_of, flow_of + shift) == same
    half = torch.zeros(1, 2, 8, 8)
    half[:, 0, :4] = 0.03  # 0.015 px on average
    assert flow_methods.same_flow(flow_of, flow_of + half)


def test_backends_are_compared_with_the_parameters_asked_for_on_a_pair_that_moves(monkeypatch):
    seen = []

    def solver(settings):
        seen.append((settings["backend"], settings["WarpingsNumber"], settings["Epsilon"], settings["Tau"]))
        return lambda pairs: torch.zeros(1, 2, 4, 4)

    flow_methods.backends_agree.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(goca, "_goca", SimpleNamespace(cuda=False))
        patch.setattr(flow_methods, "make_solver", solver)
        assert flow_methods.choose_backend(WarpingsNumber=2, Epsilon=0.07) == "goca"
    flow_methods.backends_agree.cache_clear()
    assert sorted(seen) == [("goca", 2, 0.07, 0.25), ("opencv", 2, 0.07, 0.25)]
    pair = flow_methods.generated_pair()
    assert pair.shape == (1, 2, 96, 128) and pair.dtype == torch.uint8
    settings = {"method": "TV-L1", **flow_methods.TVL1, "backend": "opencv"}
    length = flow_methods.make_solver(settings)(pair).norm(dim=1)
    y, x = np.mgrid[:96, :128] - np.array([48, 64])[:, None, None]
    a, b = 1.02 * np.cos(np.pi / 90), 1.02 * np.sin(np.pi / 90)  # 2 degrees and 2 per cent about the middle
    expected = np.hypot(a * x + b * y - x, a * y - b * x - y).mean()
    assert expected > 1 and float(length.mean()) == pytest.approx(expected, rel=0.15)
