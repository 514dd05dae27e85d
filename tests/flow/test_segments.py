"""flow.py --segment: a long video is cut while it is decoded, and nothing of it is lost, made twice or mixed."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers.flow import command, film, moving, texture, tree
from helpers.paths import ROOT

import flow
from support import flow_methods, flow_pipeline
from support.avi import AviWriter
from support.datasets import Video
from support.errors import BadInput
from support.segments import expand
from support.stores import FlowStore, RgbStore, rgb_settings
from support.worker_pool import run_in_processes

TRIAL = ["--warps", "1", "--epsilon", "0.1"]
SECOND = ["--segment", "0.4"]  # 10 pairs at 25 frames a second


def both(root, out, *more):
    """Run with --rgb -> the status."""
    return command(root / "v", out / "flow", "--rgb", str(out / "rgb"), *TRIAL, *more)


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A video of 34 frames, one of exactly 11 and one of 5; their stores uncut (root/whole) and cut (root/cut)."""
    root = tmp_path_factory.mktemp("films")
    for name, n in (("a/long", 34), ("a/eleven", 11), ("short", 5)):
        film(root / "v" / f"{name}.avi", moving(n, 24, 32, 1, 0, seed=n))
    assert both(root, root / "whole") == 0
    assert both(root, root / "cut", *SECOND, "--workers", "1") == 0
    return root


def test_the_segments_are_the_whole_without_gap_or_overlap(films):
    """All 33 pairs, each once, in order; a frame at a cut is in both files of RGB."""
    whole, cut = FlowStore(films / "whole" / "flow"), FlowStore(films / "cut" / "flow")
    assert cut.segments("a/long") == ["a/long@0", "a/long@10", "a/long@20", "a/long@30"]
    assert cut.segments("a/eleven") == cut.segments("short") == [] and "a/eleven" in cut and "short" in cut
    assert [len(cut.open(name)) for name in cut.segments("a/long")] == [10, 10, 10, 3]
    planes = [plane for name in cut.segments("a/long") for plane in cut.open(name).frames(range(len(cut.open(name))))]
    assert np.array_equal(planes, whole.open("a/long").read(range(33)))
    rgb, frames = RgbStore(films / "cut" / "rgb"), RgbStore(films / "whole" / "rgb").open("a/long").read(range(34))
    for first, name in zip((0, 10, 20, 30), cut.segments("a/long"), strict=True):
        reader = rgb.open(name)
        assert len(reader) == len(cut.open(name)) + 1
        assert np.array_equal(reader.read(range(len(reader))), frames[first:first + 11])


def test_headers_name_the_place_and_the_length(films):
    for kind in (FlowStore, RgbStore):
        store = kind(films / "cut" / kind.KIND)
        assert store.header["segment"] == 0.4 and "segment" not in kind(films / "whole" / kind.KIND).header
        headers = [store.open(name).header for name in store.segments("a/long")]
        assert [h["first_frame"] for h in headers] == [0, 10, 20, 30]
        assert [h["final"] for h in headers] == [False, False, False, True]
        assert [h["source_frames"] for h in headers] == [11, 21, 31, 34]
        assert all(h["source"] == "long.avi" and h["source_fps"] == 25 for h in headers)
        assert "first_frame" not in store.open("short").header


@pytest.mark.parametrize("more", [["--batch", "7"], ["--workers", "5"]], ids=["batches", "shared by processes"])
def test_other_ways_write_the_same(films, tmp_path, more):
    assert both(films, tmp_path, *SECOND, *more) == 0
    assert tree(tmp_path / "flow") == tree(films / "cut" / "flow")
    assert tree(tmp_path / "rgb") == tree(films / "cut" / "rgb")


def test_processes_share_one_video(tmp_path, monkeypatch):
    """Of one video and four processes each makes every fourth segment; the count of videos and pairs is that of one."""
    film(tmp_path / "v" / "long.avi", moving(45, 24, 24, 1, 0))
    seen = []

    def watch(function, jobs, *args):
        for name, kind, value in run_in_processes(function, jobs, *args):
            seen.append((name, kind))
            yield name, kind, value

    monkeypatch.setattr(flow, "run_in_processes", watch)
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL, *SECOND, "--workers", "4") == 0
    made = [sum(name == ("long", i) and kind == "progress" for name, kind in seen) for i in range(4)]
    assert all(count >= 44 for count in made)  # each passes over what the others make
    store = FlowStore(tmp_path / "s")
    assert [len(store.open(name)) for name in store.segments("long")] == [10, 10, 10, 10, 4]


def test_an_interrupted_video_goes_on_where_it_was(tmp_path):
    film(tmp_path / "v" / "long.avi", [texture(64, 64, seed) for seed in range(300)])
    store = tmp_path / "s"
    arguments = ["--videos", str(tmp_path / "v"), "--out", str(store), "--short-side", "0", "--workers", "1", *TRIAL,
                 *SECOND]
    process = subprocess.Popen([sys.executable, ROOT / "flow.py", *arguments], stdout=subprocess.DEVNULL)
    while len(list(store.glob("long@*.avi"))) < 3:
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in store.glob("long@*.avi")}
    assert 3 <= len(before) < 30
    assert flow.main(arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in before} == before  # not made again
    assert [len(FlowStore(store).open(name)) for name in FlowStore(store).segments("long")] == [10] * 29 + [9]


@pytest.mark.parametrize("more", [[], ["--batch", "8"]], ids=["processes", "batches"])
def test_only_what_is_missing_or_damaged_is_made(films, tmp_path, capsys, more):
    assert both(films, tmp_path, *SECOND) == 0
    assert both(films, tmp_path, *SECOND, *more) == 0 and "0 to do" in capsys.readouterr().out
    (tmp_path / "flow" / "a" / "long@10.avi").unlink()
    (tmp_path / "rgb" / "a" / "long@30.avi").write_bytes(b"damaged")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.avi")}
    assert both(films, tmp_path, *SECOND, *more) == 0
    assert "1 to do" in (said := capsys.readouterr().out) and "1 videos written" in said
    changed = {p.name for p in tmp_path.rglob("*.avi") if p.stat().st_mtime_ns != before.get(p)}
    assert changed == {"long@10.avi", "long@30.avi"}
    assert tree(tmp_path / "flow") == tree(films / "cut" / "flow")
    assert tree(tmp_path / "rgb") == tree(films / "cut" / "rgb")


def test_a_video_that_became_shorter_leaves_no_segment(films, tmp_path):
    film(tmp_path / "v" / "x.avi", moving(34, 24, 32, 1, 0))
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL, *SECOND) == 0
    film(tmp_path / "v" / "x.avi", moving(8, 24, 32, 1, 0))
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL, *SECOND) == 0
    assert sorted(tree(tmp_path / "s")) == ["header.json", "x.avi"]
    film(tmp_path / "v" / "x.avi", moving(13, 24, 32, 1, 0))
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL, *SECOND) == 0
    assert sorted(tree(tmp_path / "s")) == ["header.json", "x@0.avi", "x@10.avi"]


def test_segments_are_not_mixed_with_whole_videos(films, tmp_path):
    with pytest.raises(BadInput, match=r"other settings \(segment is None there and 0\.4 now\)"):
        command(films / "v", films / "whole" / "flow", *TRIAL, *SECOND)
    with pytest.raises(BadInput, match=r"other settings \(segment is 0\.4 there and None now\)"):
        command(films / "v", films / "cut" / "flow", *TRIAL)
    for name in ("x", "x@10"):
        film(tmp_path / "v" / f"{name}.avi", moving(3, 24, 24, 1, 0))
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL) == 0
    with pytest.raises(BadInput, match=r"x@10\.avi has the name of a segment of .*x\.avi \(--segment\); rename it"):
        command(tmp_path / "v", tmp_path / "t", *TRIAL, *SECOND)
    with pytest.raises(BadInput, match="--segment takes 0 to 86400"):
        command(films / "v", tmp_path / "s", "--segment", "-1")


def test_what_decodes_of_a_video_that_ends_early_is_kept(tmp_path):
    """Its last segment ends there; a listing names it, and the next run tries nothing again."""
    film(tmp_path / "v" / "half.avi", [texture(32, 32, seed) for seed in range(60)])
    path = tmp_path / "v" / "half.avi"
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL, *SECOND) == 0
    store = FlowStore(tmp_path / "s")
    names = store.segments("half")
    assert len(names) > 1 and store.open(names[-1]).header["final"]
    frames = store.open(names[-1]).header["source_frames"]
    cut = json.loads((tmp_path / "s" / "skipped.json").read_text())["cut short"]
    assert cut == {"half": f"{path} is cut short: {frames} of 60 frames decode"}
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL, *SECOND, "--strict") == 1


@pytest.mark.parametrize("more", [[], ["--batch", "8"]], ids=["processes", "batches"])
def test_a_long_video_is_named_where_it_is_not_cut(films, tmp_path, monkeypatch, capsys, more):
    monkeypatch.setattr(flow_pipeline, "LONG_FRAMES", 33)
    assert command(films / "v", tmp_path / "s", *TRIAL, *more) == 0
    assert capsys.readouterr().out.count("long.avi is long: its 34 frames are one sample") == 2  # at once, in the end
    assert command(films / "v", tmp_path / "s", *TRIAL) == 0
    assert "used, but: " in (said := capsys.readouterr().out) and said.count("are one sample") == 1
    assert command(films / "v", tmp_path / "t", *TRIAL, *SECOND, *more) == 0
    assert "is long" not in capsys.readouterr().out


def test_memory_does_not_grow_with_the_length(tmp_path, monkeypatch):
    """With --segment no more frames are held than one has, in flow and RGB."""
    film(tmp_path / "v.avi", moving(60, 24, 24, 1, 0))
    held, add = [], AviWriter.add

    def count(self, plane):
        held.append(len(self.jpegs))
        return add(self, plane)

    monkeypatch.setattr(AviWriter, "add", count)
    job = flow_pipeline.Job(tmp_path / "v.avi", str(tmp_path / "f.avi"), str(tmp_path / "r.avi"))
    for cut, most in (({}, 59), ({"segment": 0.4}, 10)):
        held.clear()
        settings = flow_pipeline.Settings({**flow_methods.make_settings(short_side=0), **cut}, rgb_settings())
        flow_pipeline.extract_video(job, settings)
        assert max(held) == most


def test_expand_makes_a_sample_of_each_segment(films):
    flows, rgb = FlowStore(films / "cut" / "flow"), RgbStore(films / "cut" / "rgb")
    videos = [Video("p/long.avi", "a/long", 3), Video("p/short.avi", "short", 1), Video("p/gone.avi", "gone", 0)]
    expanded = expand(videos, flows, rgb)
    assert [(v.name, v.label) for v in expanded] == [
        ("a/long@0", 3), ("a/long@10", 3), ("a/long@20", 3), ("a/long@30", 3), ("short", 1), ("gone", 0)]
    assert expand(videos, rgb, rgb) == expand(videos, flows, frames=False) == expanded
    with pytest.raises(BadInput, match=r"holds a/long in segments, whose pictures .*RGB store: add --rgb RGB"):
        expand(videos, flows)
    assert expand(videos[1:], flows) == videos[1:]


def test_what_an_interrupted_run_left_needs_pictures_too(films, tmp_path):
    shutil.copytree(films / "cut" / "flow", tmp_path / "s")
    for first in (10, 20, 30):
        (tmp_path / "s" / "a" / f"long@{first}.avi").unlink()
    videos = [Video("p/long.avi", "a/long", 3)]
    assert [v.name for v in expand(videos, FlowStore(tmp_path / "s"), frames=False)] == ["a/long@0"]
    with pytest.raises(BadInput, match="holds a/long in segments"):
        expand(videos, FlowStore(tmp_path / "s"))


def test_info_counts_segments_as_their_video(films, capsys):
    assert flow.main(["info", str(films / "cut" / "flow"), "--videos", str(films / "v")]) == 0
    said = capsys.readouterr().out
    assert "3 videos in 6 files, 47 flow fields" in said and "0 of the 3 videos below" in said


# --- what goes wrong -------------------------------------------------------------------------------------------------
def test_a_picture_of_a_film_in_segments_is_of_one_of_them(films, tmp_path):
    picture = ["--picture", str(tmp_path / "p.png")]
    with pytest.raises(BadInput, match="a/long in 4 segments; name one of them: a/long@0, a/long@10, a/long@20, "):
        flow.main(["info", str(films / "cut" / "flow"), "--video", "a/long", *picture])
    assert flow.main(["info", str(films / "cut" / "flow"), "--video", "a/long@10", *picture]) == 0


def test_stores_that_were_not_cut_alike_are_refused(films):
    cut, whole = ({kind.KIND: kind(films / root / kind.KIND) for kind in (FlowStore, RgbStore)}
                  for root in ("cut", "whole"))
    videos = [Video("p/short.avi", "short", 0)]  # whose files are the same in both
    with pytest.raises(BadInput, match=r"cut/flow was made with --segment 0\.4, but .*whole/rgb with no --segment"):
        expand(videos, cut["flow"], whole["rgb"])
    with pytest.raises(BadInput, match=r"whole/flow was made with no --segment, but .*cut/rgb with --segment 0\.4"):
        expand(videos, whole["flow"], cut["rgb"])
    assert expand(videos, whole["flow"], whole["rgb"]) == videos


def test_a_film_that_is_called_as_a_segment_is_a_film(tmp_path):
    """talk@10.mp4: in a store without --segment it is no piece of `talk`."""
    film(tmp_path / "v" / "x@10.avi", moving(3, 24, 24, 1, 0))
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL) == 0
    store = FlowStore(tmp_path / "s")
    assert list(store.films()) == ["x@10"] and store.segments("x") == []
