"""Stage 1 among machines that misbehave: processes that stop, disks and cards that go away, names that mislead."""

import inspect
import multiprocessing
import os
import signal
import struct
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from test_flow import ROOT, command, make_set

import data
import videos
import workers

TRIAL = ["--warps", "1", "--epsilon", "0.1"]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder of three videos."""
    return make_set(tmp_path_factory.mktemp("three") / "videos", 3)


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------
def misbehave(job, settings, tell):
    """Work of `in_processes`: what to do is the job's second entry."""
    path, what = job
    if what == "stop":  # in the middle of a message
        tell(os.getpid())
        pipe = inspect.getclosurevars(tell).nonlocals["pipe"]
        os.write(pipe.fileno(), struct.pack("!i", 3_000_000) + bytes(1000))
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "read":
        next(data.decode(path))
    return what


def files(folder, *whats):
    """Jobs of empty files."""
    for k in range(len(whats)):
        (folder / f"{k}.avi").touch()
    return {k: (str(folder / f"{k}.avi"), what) for k, what in enumerate(whats)}


@pytest.mark.parametrize("dies", [True, False], ids=["is killed", "waits for a dead disk"])
def test_a_message_that_stops_half_way_costs_its_video(tmp_path, monkeypatch, dies):
    """Also where not even SIGKILL ends the process."""
    kill = BaseProcess.kill
    if not dies:
        monkeypatch.setattr(BaseProcess, "kill", lambda self: None)
        monkeypatch.setattr(workers, "GRACE", 0.3)
    began, events = time.monotonic(), []
    for event in workers.in_processes(misbehave, files(tmp_path, "stop", "a", "b", "c"), None, 2, 1.5):
        events.append(event)
    told = [value for _, kind, value in events if kind == "told"]
    try:
        assert {name for name, kind, _ in events if kind == "done"} == {1, 2, 3}
        (sentence,) = [value for _, kind, value in events if kind == "failed"]
        assert "0.avi gave nothing for 1.5 s" in sentence
        assert time.monotonic() - began < 20 and not multiprocessing.active_children()
        assert Path(f"/proc/{told[0][0]}").exists() != dies
    finally:
        monkeypatch.setattr(BaseProcess, "kill", kill)
        with suppress(ProcessLookupError):
            os.kill(told[0][0], signal.SIGKILL)


def chatter(job, settings, tell):
    """Work of `in_processes`: messages too large for a pipe, with the time when each is sent."""
    for _ in range(10):
        tell(time.monotonic(), bytes(1_000_000))


def test_no_message_is_received_before_the_last_was_taken(tmp_path):
    """Who waits for a card makes the decoders wait, and costs them no video by --time-limit."""
    events = workers.in_processes(chatter, files(tmp_path, None), None, 1, 0.5)
    first = next(events)[2][0]
    time.sleep(1)  # twice the limit
    assert sum(value[0] - first < 0.9 for _, kind, value in events if kind == "told") <= 2


def test_processes_killed_one_after_the_other_end_the_run(tmp_path, monkeypatch):
    """A memory limit is no fault of the videos; one that works in between is a sign that it suffices."""
    assert workers.IN_A_ROW == 20
    monkeypatch.setattr(workers, "IN_A_ROW", 4)
    with pytest.raises(data.BadInput, match=r"4 videos in a row gave nothing.*\(exit code -9\).*fewer --workers"):
        list(workers.in_processes(misbehave, files(tmp_path, *["kill"] * 6), None, 2, 60))
    whats = ["kill"] * 2 + ["fine"] + ["kill"] * 3
    assert len(list(workers.in_processes(misbehave, files(tmp_path, *whats), None, 1, 60))) == 6


def test_a_long_tmpdir_is_a_sentence(three, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    done = subprocess.run([sys.executable, str(ROOT / "flow.py"), "--videos", str(three), "--out", str(tmp_path / "s")],
                          capture_output=True, text=True, env={**os.environ, "TMPDIR": str(long)})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"no socket for them in {long}" in done.stderr and "set TMPDIR to" in done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------------------------------
def test_videos_that_vanish_one_after_the_other_end_the_run(tmp_path):
    """Not so those whose content is bad: they are not away."""
    jobs = files(tmp_path, *["read"] * 50)
    assert {kind for _, kind, _ in workers.in_processes(misbehave, jobs, None, 2, 60)} == {"failed"}
    for path, _ in jobs.values():
        os.remove(path)
    with pytest.raises(data.BadInput, match=r"20 videos in a row gave nothing.*avi doesn't exist.*same command"):
        list(workers.in_processes(misbehave, jobs, None, 2, 60))


@pytest.mark.parametrize("more", [[], ["--batch", "8"]], ids=["processes", "batches"])
def test_a_folder_that_goes_away_ends_the_run(tmp_path, monkeypatch, more):
    make_set(tmp_path / "v", 6)
    found = data.find_videos(tmp_path / "v")

    def unplug(root):
        os.rename(root, tmp_path / "unplugged")
        return found

    monkeypatch.setattr(data, "find_videos", unplug)
    with pytest.raises(data.BadInput, match=r"--videos .*v is no longer a folder; .*the same command continues"):
        command(tmp_path / "v", tmp_path / "s", *TRIAL, *more)
    os.rename(tmp_path / "unplugged", tmp_path / "v")
    monkeypatch.undo()
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL, *more) == 0
    assert all(name in data.FlowStore(tmp_path / "s") for name in found)


def test_a_scan_condemns_nothing_that_is_away(tmp_path, monkeypatch):
    """It is looked at again by the next, though it has not changed."""
    make_set(tmp_path / "v", 2)
    (tmp_path / "v" / "link.avi").symlink_to("nowhere")
    file = tmp_path / "v" / "a" / "v1.avi"

    def unplug(*args):
        file.rename(tmp_path / "unplugged")
        yield from workers.in_processes(*args)

    monkeypatch.setattr(videos, "in_processes", unplug)
    index, _ = data.scan(tmp_path / "v", tmp_path / "i.npz", workers=1)
    assert [index.entries[name][2] for name in ("a/v0", "a/v1", "link")] == [4, 0, 0]
    assert all(index.entries[name][4].endswith("doesn't exist") for name in ("a/v1", "link"))
    (tmp_path / "unplugged").rename(file)
    monkeypatch.undo()
    index, known = data.scan(tmp_path / "v", tmp_path / "i.npz", workers=1)
    assert index.entries["a/v1"][2] == 4 and known == {"new": 0, "changed": 1, "removed": 0, "kept": 2}
