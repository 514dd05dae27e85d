"""Stage 1 among faults: bad videos cost themselves only, outputs that fail are one message, nothing is harmed."""

import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.damage import mutate
from helpers.flow import command, extract, film, make_set, moving, texture, tree
from helpers.paths import ROOT
from helpers.read_only import READ_ONLY

import flow
from support import flow_methods, flow_pipeline
from support.errors import BadInput
from support.flow_progress import Progress
from support.stores import FlowStore, RgbStore, open_store
from support.videos import find_videos

TRIAL = ["--warps", "1", "--epsilon", "0.1"]


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """A folder of five videos and their store."""
    root = make_set(tmp_path_factory.mktemp("five") / "videos", 5).parent
    assert command(root / "videos", root / "store") == 0
    return root


# ---------------------------------------------------------------------------------------------------------------------
# Videos
# ---------------------------------------------------------------------------------------------------------------------
BAD = {"empty": "is empty", "text": "no frame that OpenCV can decode", "one": "has one frame only",
       "headless": "no frame that OpenCV can decode"}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    root = make_set(tmp_path_factory.mktemp("mixed"), 1)
    (root / "empty.mp4").touch()
    (root / "text.mp4").write_text("not a video\n" * 100)
    film(root / "one.avi", moving(1, 24, 24, 1, 0))
    film(root / "headless.mp4", moving(30, 32, 32, 1, 0), "mp4v")  # its index comes last
    film(root / "half.avi", moving(30, 32, 32, 1, 0))
    for name in ("headless.mp4", "half.avi"):
        whole = (root / name).read_bytes()
        (root / name).write_bytes(whole[:len(whole) // 2])
    return root


@pytest.mark.parametrize("name", BAD)
def test_one_message(mixed, tmp_path, capfd, name):
    (path,) = mixed.glob(f"{name}.*")
    with pytest.raises(BadInput, match=BAD[name]) as caught:
        extract(path, tmp_path / "flow.avi")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # no codec adds its own
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [[], ["--batch", "8"]], ids=["processes", "batches"])
def test_bad_among_good(mixed, tmp_path, capsys, more):
    assert command(mixed, tmp_path / "s", *more) == 0
    out = capsys.readouterr().out
    assert "2 videos written" in out and "4 skipped, 1 cut short" in out
    listed = json.loads((tmp_path / "s" / "skipped.json").read_text())
    assert listed["skipped"].keys() == BAD.keys() and listed["cut short"].keys() == {"half"}
    for name, words in BAD.items():
        assert words in listed["skipped"][name] and f"{name}." in listed["skipped"][name]
        assert f"skipped: {listed['skipped'][name]}" in out
    n = len(FlowStore(tmp_path / "s").open("half"))
    assert 1 < n < 29 and f"half.avi is cut short: {n + 1} of 30 frames decode" in out
    assert sorted(tree(tmp_path / "s")) == ["a/v0.avi", "half.avi", "header.json", "skipped.json"]


def test_strict_and_mending(mixed, tmp_path, capsys):
    videos = tmp_path / "v"
    for name, content in tree(mixed).items():
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        (videos / name).write_bytes(content)
    assert command(videos, tmp_path / "s", "--strict") == 1
    assert command(videos, tmp_path / "s", "--strict") == 1  # retried, listed again; what is cut short too
    assert "0 videos written" in (out := capsys.readouterr().out) and out.count("half.avi is cut short") == 2
    for name in BAD:
        (bad,) = videos.glob(f"{name}.*")
        bad.unlink()
        film(videos / f"{name}.avi", moving(3, 24, 24, 1, 0))
    assert command(videos, tmp_path / "s", "--strict") == 1  # one is cut short still
    film(videos / "half.avi", moving(3, 24, 24, 1, 0))
    assert command(videos, tmp_path / "s", "--strict") == 0
    assert not (tmp_path / "s" / "skipped.json").exists()
    assert len(FlowStore(tmp_path / "s").open("half")) == 2


def test_nothing_good(tmp_path):
    (tmp_path / "v").mkdir()
    with pytest.raises(BadInput, match="holds no video"):
        command(tmp_path / "v", tmp_path / "s")
    (tmp_path / "v" / "empty.mp4").touch()
    with pytest.raises(BadInput, match="none of the 1 videos"):
        command(tmp_path / "v", tmp_path / "s")
    with pytest.raises(BadInput, match="is no folder"):
        command(tmp_path / "absent", tmp_path / "s")


def test_store_cannot_be_written(five, tmp_path):
    """No fault of a video: the run ends with a message, and what stood in the store is untouched."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match=r"--out .*file can't be used as a folder"):
        command(five / "videos", tmp_path / "file")
    open_store(FlowStore, tmp_path / "s", flow_methods.make_settings(short_side=0))
    (tmp_path / "s" / "a").write_text("in the way")
    with pytest.raises(BadInput, match=r"v\d\.avi can't be written"):
        command(five / "videos", tmp_path / "s")
    assert sorted(tree(tmp_path / "s")) == ["a", "header.json"]


class Deadly(str):
    """A path that ends the process that receives it, as a crash in a codec would."""

    def __reduce__(self):
        return os._exit, (7,)


@pytest.mark.parametrize(("workers", "device"), [(1, None), (3, None), (2, torch.device("cpu"))])
def test_crash_costs_one_video(five, tmp_path, workers, device):
    found = find_videos(five / "videos")
    jobs = {name: flow_pipeline.Job(path, str(tmp_path / f"{name}.avi"), None) for name, path in found.items()}
    for name in ("a/v0", "a/v3"):
        jobs[name] = jobs[name]._replace(path=Deadly("crash.avi"))
    progress = Progress(len(jobs))
    settings = flow_pipeline.Settings(flow_methods.make_settings(short_side=0))
    remarks = flow.Remarks(settings.cuts)
    skipped = flow.extract_all(jobs, settings, workers, progress, remarks, 60, device)
    assert skipped.keys() == {"a/v0", "a/v3"} and not remarks.cut and progress.videos == 5 and progress.pairs == 9
    assert all(s.startswith("crash.avi ended the process that read it (exit code 7)") for s in skipped.values())
    for name in ("v1", "v2", "v4"):
        assert (tmp_path / "a" / f"{name}.avi").read_bytes() == (five / "store" / "a" / f"{name}.avi").read_bytes()


def test_status_and_message_of_the_command(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "flow.py"), "--videos", str(tmp_path), "--out",
                           str(tmp_path / "s")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Mutated videos, full disks
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more", [[], ["--batch", "64"]], ids=["processes", "batches"])
def test_mutated_videos_are_all_accounted_for(real_clips, tmp_path, more):
    """Bit flips, cuts, swapped headers of real videos: no crash, no hang, written + skipped = all."""
    rng = np.random.default_rng(1)
    sources = [p.read_bytes() for p in sorted((real_clips / "weizmann").rglob("*.avi"))[:3]]
    (tmp_path / "v").mkdir()
    for k in range(18):
        (tmp_path / "v" / f"{k}.avi").write_bytes(mutate(sources[k % 3], rng))
    (tmp_path / "v" / "good.avi").write_bytes(sources[0])
    assert flow.main(["--videos", str(tmp_path / "v"), "--out", str(tmp_path / "s"), "--rgb", str(tmp_path / "r"),
                      "--short-side", "16", *TRIAL, "--time-limit", "30", *more]) == 0
    skipped = json.loads((tmp_path / "s" / "skipped.json").read_text())["skipped"]
    flows, rgbs = FlowStore(tmp_path / "s"), RgbStore(tmp_path / "r")
    for name in find_videos(tmp_path / "v"):
        assert (name in flows) == (name in rgbs) == (name not in skipped), name
        if name in flows:
            reader, frames = flows.open(name), rgbs.open(name)
            assert len(frames) == len(reader) + 1 and len(reader.read(range(len(reader)))) == len(reader)
    assert 3 < len(skipped) < 18


@pytest.fixture
def big(tmp_path):
    """A small video and one whose flow takes more than the 20 kB at which the disk is to end."""
    film(tmp_path / "v" / "a.avi", moving(3, 24, 24, 1, 0))
    film(tmp_path / "v" / "b.avi", [texture(160, 160, seed) for seed in range(4)])
    return tmp_path


def limit_files():
    """From here on no file may pass 20 kB -> the limits before."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    return before


def assert_unharmed(root, message):
    """The small video's flow is whole, nothing of the other is left."""
    assert message.startswith(f"{root / 's' / 'b.avi'} could not be written (File too large)")
    assert sorted(tree(root / "s")) == ["a.avi", "header.json"]
    assert len(FlowStore(root / "s").open("a")) == 2


def test_a_full_disk_is_one_message(big, run_script):
    said = run_script("flow.py", "--videos", big / "v", "--out", big / "s", "--short-side", "0", "--workers", "1",
                      *TRIAL, status=2, largest=20_000)
    _, error = said.split("error: ")
    assert error.count("\n") == 1
    assert_unharmed(big, error)


def test_a_full_disk_in_batches(big):
    before = limit_files()
    try:
        with pytest.raises(BadInput) as caught:
            command(big / "v", big / "s", *TRIAL, "--batch", "2", "--workers", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_unharmed(big, str(caught.value))


def test_a_finished_store_can_be_looked_at_where_nothing_can_be_written(forked, tmp_path):
    make_set(tmp_path / "v", 1)
    (tmp_path / "v" / "text.mp4").write_text("no film")
    store = tmp_path / "disk" / "s"
    assert command(tmp_path / "v", store, *TRIAL) == 0
    if subprocess.run(["unshare", "-rm", "sh", "-c", READ_ONLY.format(root=tmp_path / "disk")],
                      capture_output=True).returncode:
        pytest.skip("no read-only mount can be made here")

    def flow_there(status):
        forked("flow_on_a_read_only_disk", root=tmp_path / "disk", status=status, said=tmp_path / "said",
               argv=["--videos", str(tmp_path / "v"), "--out", str(store), "--workers", "1", "--short-side", "0",
                     *TRIAL])
        return (tmp_path / "said").read_text()

    said = flow_there(0)  # its list of what was skipped stands as it was
    assert "1 skipped" in said and "error" not in said and "warning" not in said
    (tmp_path / "v" / "text.mp4").unlink()
    said = flow_there(2)
    assert f"error: {store / 'skipped.json'} is outdated and can't be removed (Read-only file system)" in said
    assert "Traceback" not in said
    (store / "skipped.json").unlink()
    said = flow_there(0)
    assert "0 to do" in said and "error" not in said
    film(tmp_path / "v" / "more.avi", moving(3, 24, 24, 1, 0))  # and work that is new does not begin
    said = flow_there(2)
    assert f"error: --out {store} can't be written (Read-only file system)" in said and "Traceback" not in said


def test_an_output_whose_name_no_file_can_have(five, tmp_path):
    long, loop = tmp_path / ("x" * 300), tmp_path / "loop"
    loop.symlink_to(loop)
    for out in (long, loop):
        with pytest.raises(BadInput, match=r"--out .* can't be used as a folder \((File name too|Too many)"):
            command(five / "videos", out)
        with pytest.raises(BadInput, match=r"--rgb .* can't be used as a folder"):
            command(five / "videos", five / "store", "--rgb", str(out))
    with pytest.raises(BadInput, match=r"header\.json is damaged \(.*File name too long"):
        flow.main(["info", str(long)])


def test_an_output_that_takes_nothing(five):
    """/proc is nobody's to write in, not even the superuser's."""
    for stores in (["/proc/flow"], [five / "store", "--rgb", "/proc/flow"]):
        with pytest.raises(BadInput, match=r"--(out|rgb) /proc/flow can't be written .*; choose a folder that"):
            command(five / "videos", *stores)
