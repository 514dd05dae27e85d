"""Little shared memory, as in a container of Docker's defaults, and processes that fall silent: an error message, and
never a wait without limit."""

import gc
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
import torch
from helpers.clips import film, numbered
from helpers.paths import ROOT

import data
from experiments.bench.loader import long_film
from support.avi import write_avi
from support.datasets import read_split
from support.errors import TemporaryFailure
from support.loader import Clips, Loader
from support.stores import FlowStore
from support.videos import frames_at

SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import data
from support.cli import command_line
from support.datasets import read_split
from support.epoch_batches import EpochBatches
from support.loader import Loader
from support.stores import FlowStore

def main():
    videos, store = read_split("folder", {films!r}).videos, FlowStore({flow!r})
    for loader in ({loaders},):
        print("batches:", sum(1 for _ in loader()), flush=True)
    return 0

if __name__ == "__main__":
    command_line(main)
"""
TRAINING = ("Loader(data.TrainClips(videos, store, frames=8, n_short=0, size=112), "
            "EpochBatches(6, {batch}, 1).after, {workers})")
TESTING = ("Loader(data.TestClips(videos, store, frames=6, size=112), "
           "lambda done: {{'sampler': range(done, 6), 'batch_size': None}}, {workers})")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Six films of 16 frames with their flow."""
    root = tmp_path_factory.mktemp("films")
    (root / "flow").mkdir()
    (root / "flow" / "header.json").write_text(json.dumps({"kind": "flow", "version": 1}))
    for name in "abcdef":
        film(root / "films" / f"{name}.avi", numbered(16))
        write_avi(root / "flow" / f"{name}.avi", np.full((15, 48, 32), 128, np.uint8), {})
    return root


@pytest.fixture
def run_in(films, tmp_path):
    """run(size, *loaders) reads all of them, one after the other, where /dev/shm has that size -> CompletedProcess."""
    def run(size, *loaders):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(root=str(ROOT), films=str(films / "films"), flow=str(films / "flow"),
                                        loaders=", ".join(f"lambda: {each}" for each in loaders)))
        inside = f"mount -t tmpfs -o size={size} tmpfs /dev/shm && exec {sys.executable} {script}"
        return subprocess.run(["unshare", "-m", "sh", "-c", inside], capture_output=True, text=True, timeout=240)
    try:
        subprocess.run(["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /dev/shm"], check=True,
                       capture_output=True)
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"no file system may be mounted here ({e})")
    return run


def test_training_looks_at_shared_memory_beforehand(run_in):
    # a batch of 2: 2 x 2 clips x 8 frames x 112^2 x 5 bytes = 2.0 MB; two ahead of each process
    done = run_in("8m", *(TRAINING.format(batch=2, workers=n) for n in (0, 2, 3)))
    assert done.stdout == 2 * "batches: 3\n" and done.returncode == 2 and "Traceback" not in done.stderr
    assert "/dev/shm has 8 MB free, but each of 3 has up to 2 batches of 2 MB ready" in done.stderr
    for words in ("(--workers 2 would fit)", "--shm-size", "--ipc=host", "--workers 0"):
        assert words in done.stderr


def test_evaluation_in_little_shared_memory_is_an_error_message(run_in):
    # 30 views x 6 frames x 112^2 x 5 bytes = 11 MB
    done = run_in("8m", *(TESTING.format(workers=n) for n in (0, 1)))
    assert done.stdout == "batches: 6\n" and done.returncode == 2 and "Traceback" not in done.stderr
    assert "No space left on device" in done.stderr and "--shm-size" in done.stderr  # torch's reason, whole
    assert run_in("64m", TESTING.format(workers=1)).stdout == "batches: 6\n"


class Collecting(Clips):
    """Whether the collector is on; it is also called."""
    time_limit = 0.1

    def __getitem__(self, index):
        gc.collect()
        return torch.tensor(int(gc.isenabled()))


class Silent(Clips):
    """Its third item never comes."""
    time_limit = 0.1

    def __getitem__(self, index):
        time.sleep(600 if index == 2 else 0)
        return torch.tensor(index)


@pytest.mark.parametrize("batch", [1, None])
def test_processes_that_fall_silent_are_given_up(monkeypatch, batch):
    got, looks = [], []

    def clock():
        """Half a minute goes by at each look once the silence has begun; until then a busy machine has all its time."""
        looks.extend([0] if len(got) == 2 else [])
        return time.monotonic() + 30 * len(looks)

    monkeypatch.setattr("support.loader.time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(Loader, "LOOK_EVERY", 1)
    with pytest.raises(TemporaryFailure, match=r"loader processes gave nothing for 60\.2 s; see"):
        for item in Loader(Silent(list("abcdef")), lambda done: {"batch_size": batch, "sampler": range(done, 6)}, 1):
            got.append(int(item))
    assert got == [0, 1] and 3 <= len(looks) <= 4


def left_by_pyav(path):
    container = av.open(str(path))
    container.streams.video[0].thread_type = "AUTO"
    frames = container.decode(video=0)
    next(frames)
    return container, frames


def left_by_opencv(path):
    film = cv2.VideoCapture(str(path))
    assert film.read()[0]
    return film


@pytest.mark.parametrize("left", [left_by_pyav, left_by_opencv])
def test_a_decoder_that_was_left_open_stops_no_process(tmp_path, monkeypatch, left):
    """In a cycle, as an exception's traceback leaves it, it is the collector's; in a fork it would wait for ever for
    its threads, which are the main process's."""
    long_film(tmp_path / "film.mp4", 1)
    monkeypatch.setattr(Loader, "LOOK_EVERY", 1)
    monkeypatch.setattr(Loader, "PATIENCE", 20)
    enabled = gc.isenabled()
    gc.disable()
    try:
        cycle = {"decoder": left(tmp_path / "film.mp4")}
        cycle["itself"] = cycle
        del cycle
        got = list(Loader(Collecting(list("abc")), lambda done: {"batch_size": None, "sampler": range(done, 3)}, 1))
        assert got == [1, 1, 1] and not gc.isenabled()
    finally:
        if enabled:
            gc.enable()


def test_a_film_that_stalls_in_evaluation_is_a_fault(films, monkeypatch):
    found = read_split("folder", films / "films").videos
    monkeypatch.setattr("support.frames.frames_at",
                        lambda path, t, *more: time.sleep(9) if "b.avi" in str(path) else frames_at(path, t))
    clips = data.TestClips(found, FlowStore(films / "flow"), frames=4, size=16, time_limit=0.5)
    assert clips[1] == {"index": 1, "fault": f"{found[1].path} gave nothing for 0.5 s; see whether its disk is well, "
                        f"and cut a film of hours by flow.py --segment"}
    assert clips[0]["index"] == 0 and "fault" not in clips[0]
