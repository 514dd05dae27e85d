"""Stage 1 on a GPU that fills, fails, or is slower than the decoders: with stand-ins for its solver, on the CPU."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import cv2
import numpy as np
import pytest
import torch
from helpers.flow import command, film, make_set, moving

import flow
from support import flow_gpu, flow_pipeline
from support.avi import AviWriter
from support.errors import BadInput
from support.stores import FlowStore
from support.worker_pool import MAX_CONSECUTIVE_FAILURES

TRIAL = ["--warps", "1", "--epsilon", "0.1"]


class FakeGpu:
    """A solver that runs out of memory beyond so many pixels at once, and the numbers of pairs that it got."""

    def __init__(self, room=10**9):
        self.room, self.counts = room, []

    def __call__(self, pairs):
        self.counts.append(len(pairs))
        if len(pairs) * pairs[0, 0].numel() > self.room:
            raise torch.OutOfMemoryError("full")
        return torch.zeros(len(pairs), 2, *pairs.shape[2:])


@pytest.fixture
def gpu(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(flow_gpu, "make_solver", lambda settings: gpu)
    monkeypatch.setattr(flow_gpu, "RETRY_SECONDS", (0, 0, 0))
    return gpu


@pytest.fixture
def pool(gpu):
    pool = flow_gpu.FlowBatches({"quality": 90}, torch.device("cpu"), 16, 1)
    yield pool
    pool.close()


def pairs_of(pool, pairs, side):
    """Send so many pairs of side x side px -> what comes back: an AviWriter or a message."""
    pool.put([("video", np.zeros((pairs + 1, side, side), np.uint8))])
    ((_, piece),) = pool.get()
    return piece


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory
# ---------------------------------------------------------------------------------------------------------------------
def test_a_video_too_large_costs_the_others_no_speed(gpu, pool):
    gpu.room = 16 * 16 * 16
    assert "too large for the memory of cpu (99x99 px)" in pairs_of(pool, 5, 99)
    gpu.counts.clear()
    assert len(pairs_of(pool, 64, 16).jpegs) == 64 and gpu.counts == [16] * 4


def test_what_failed_is_tried_again_ever_more_rarely(gpu, pool, capsys):
    gpu.room = 4 * 16 * 16
    assert len(pairs_of(pool, 400, 16).jpegs) == 400
    expected = [16, 8] + [4] * 8 + [8] + [4] * 16 + [8] + [4] * 32 + [8]
    assert gpu.counts[:len(expected)] == expected
    assert capsys.readouterr().out.count("out of memory") == 2  # 8 and 4 pairs, once each
    gpu.room = 10**9
    pairs_of(pool, 2000, 16)
    gpu.counts.clear()
    pairs_of(pool, 64, 16)
    assert gpu.counts == [16] * 4


def test_memory_that_another_job_takes_for_a_while_costs_no_video(gpu, pool, capsys):
    assert len(pairs_of(pool, 3, 16).jpegs) == 3

    def wait(pause):
        pauses.append(pause)
        gpu.room = 10**9 if len(pauses) == 3 else 0

    gpu.room, pauses = 0, []
    pool.closing.wait = wait
    assert len(pairs_of(pool, 3, 12).jpegs) == 3 and len(pauses) == 3
    assert "cpu is full; trying again in 0 s" in capsys.readouterr().out


def test_memory_that_another_job_keeps_ends_the_run(gpu, pool):
    """What never fitted is too large; what did, or is smaller, is not."""
    assert len(pairs_of(pool, 3, 16).jpegs) == 3
    gpu.room = 0
    assert "too large" in pairs_of(pool, 3, 17)
    for side in (16, 12):
        with pytest.raises(BadInput, match=r"cpu is full: another job has its memory; the same command continues"):
            pairs_of(pool, 3, side)


def test_a_larger_video_waits_for_memory_that_other_jobs_have(gpu, pool, monkeypatch):
    """Only where they do: it is skipped in the end, not as one that no GPU of this kind could take."""
    taken, pauses = 5 * 10**9, []
    monkeypatch.setattr(flow_gpu, "other_jobs_bytes", lambda device: taken)
    assert len(pairs_of(pool, 3, 16).jpegs) == 3

    def wait(pause):
        pauses.append(pause)
        gpu.room = 10**9 if len(pauses) == 2 else 0

    gpu.room, pool.closing.wait = 0, wait
    assert len(pairs_of(pool, 3, 20).jpegs) == 3 and len(pauses) == 2
    gpu.room = 0
    message = pairs_of(pool, 3, 24)
    assert len(pauses) == 5 and "memory of cpu (24x24 px), of which other jobs have 5.0 GB: the same command" in message
    taken = 0
    assert "memory of cpu (24x24 px); take a smaller" in pairs_of(pool, 3, 24) and len(pauses) == 5


def test_what_other_jobs_have_is_what_is_neither_free_nor_ours(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * 2**30, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20 * 2**30)
    assert flow_gpu.other_jobs_bytes(torch.device("cuda")) == 30 * 2**30
    assert flow_gpu.other_jobs_bytes(torch.device("cpu")) == 0
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 49.5 * 2**30)
    assert flow_gpu.other_jobs_bytes(torch.device("cuda")) == 0  # CUDA's own share of our process


def test_a_gpu_without_memory_for_anything_ends_the_run(gpu, pool):
    """From the start on: then nothing distinguishes videos that are too large from a GPU that is full."""
    gpu.room = 99
    for _ in range(2):
        for _ in range(MAX_CONSECUTIVE_FAILURES - 1):
            assert "too large" in pairs_of(pool, 2, 16)
        pairs_of(pool, 2, 4)
    for _ in range(MAX_CONSECUTIVE_FAILURES - 1):
        pairs_of(pool, 2, 16)
    with pytest.raises(BadInput, match=r"cpu had no memory for any of 20 batches in a row.*whether another job"):
        pairs_of(pool, 2, 16)


def test_a_video_is_too_large_only_alone(gpu, pool):
    """What another thread computes meanwhile may be what fills the GPU."""
    under_way, peak, lock = [0], [], threading.Lock()

    def crowded(pairs):
        with lock:
            under_way[0] += 1
            peak.append(under_way[0])
        try:
            time.sleep(0.02)
            if under_way[0] > 1:
                raise torch.OutOfMemoryError("full")
            return torch.zeros(len(pairs), 2, *pairs.shape[2:])
        finally:
            under_way[0] -= 1

    pool.solve, pool.count, pool.solvers = crowded, 2, ThreadPoolExecutor(2)
    pool.free = threading.Semaphore(2)
    for _ in range(12):
        pool.put([("video", np.zeros((3, 16, 16), np.uint8))])
    pieces = [piece for _ in range(12) for _, piece in pool.get()]
    assert max(peak) == 2 and all(len(piece.jpegs) == 2 for piece in pieces)


# ---------------------------------------------------------------------------------------------------------------------
# Faults of one video, of the GPU, of the disk
# ---------------------------------------------------------------------------------------------------------------------
def test_what_cannot_be_encoded_or_written_costs_its_video(tmp_path, monkeypatch):
    make_set(tmp_path / "v", 3)
    film(tmp_path / "v" / "wide.avi", moving(4, 24, 40, 1, 0))
    add, write = AviWriter.add, AviWriter.write

    def bad_add(self, plane):
        if plane.shape[1] == 40:
            raise cv2.error("assertion failed\nsomewhere")
        return add(self, plane)

    def bad_write(self, path, header):
        if "v1" in str(path):
            raise BadInput(f"{path} would pass the 4 GB of an AVI file")
        if "v2" in str(path):
            raise MemoryError("no more")
        write(self, path, header)

    monkeypatch.setattr(AviWriter, "add", bad_add)
    monkeypatch.setattr(AviWriter, "write", bad_write)
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL, "--batch", "4") == 0
    skipped = json.loads((tmp_path / "s" / "skipped.json").read_text())["skipped"]
    assert skipped.keys() == {"a/v1", "a/v2", "wide"} and "a/v0" in FlowStore(tmp_path / "s")
    assert "v1.avi would pass the 4 GB" in skipped["a/v1"]
    assert skipped["a/v2"].endswith("v2.avi failed: MemoryError no more")
    assert skipped["wide"].endswith("wide.avi failed: error assertion failed somewhere")


def test_a_gpu_that_fails_is_a_message(tmp_path, monkeypatch):
    """What it computes afterwards is not to be trusted: nothing is skipped, nothing goes on."""
    make_set(tmp_path / "v", 2)
    monkeypatch.setattr(flow, "choose_device", lambda *_: (torch.device("cuda"), None))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_: (_ for _ in ()).throw(RuntimeError("illegal\naccess")))
    with pytest.raises(BadInput, match=r"a GPU failed \(illegal access\); the same command continues, --device"):
        command(tmp_path / "v", tmp_path / "s", *TRIAL)
    assert not list((tmp_path / "s").rglob("*.avi"))


# ---------------------------------------------------------------------------------------------------------------------
# Waiting
# ---------------------------------------------------------------------------------------------------------------------
def videos_of(monkeypatch, folder, count, pairs, size):
    """Stand-in for the decoders: so many videos of a chunk each, size(k) px -> {name: Job}, the list of those taken."""
    taken = []

    def decode(*_):
        for k in range(count):
            taken.append(k)
            yield k, "progress", (flow_gpu.Chunk(np.zeros((pairs + 1, *size(k)), np.uint8), pairs, pairs, 0),)
            yield k, "progress", (flow_gpu.FlowFile(str(folder / f"{k}.avi"), {}),)
            yield k, "done", {"source_frames": pairs + 1, "source_declared": 0}

    monkeypatch.setattr(flow_gpu, "run_in_processes", decode)
    return {k: flow_pipeline.Job(f"{k}.avi", None, None) for k in range(count)}, taken


def test_decoders_wait_for_the_gpu(gpu, monkeypatch, tmp_path):
    jobs, taken = videos_of(monkeypatch, tmp_path, 40, 8, lambda k: (16, 16))
    go, solve = threading.Event(), gpu.__call__
    monkeypatch.setattr(flow_gpu, "make_solver", lambda settings: lambda pairs: go.wait(30) and solve(pairs))
    settings, done = flow_pipeline.Settings({"quality": 90}), []
    thread = threading.Thread(target=lambda: done.extend(
        flow_gpu.extract_batched(jobs, settings, 1, 60, torch.device("cpu"), 8)))
    thread.start()
    time.sleep(0.5)
    assert len(taken) == 4
    go.set()
    thread.join()
    assert sum(kind == "done" for _, kind, _ in done) == len(taken) == 40


def test_videos_of_many_sizes_wait_for_others_of_theirs_in_bounds(gpu, monkeypatch, tmp_path):
    """Frames of four batches at most, whatever the sizes."""
    jobs, taken = videos_of(monkeypatch, tmp_path, 40, 3, lambda k: (16, 16 + k))
    put, sent, waiting = flow_gpu.FlowBatches.put, [], []

    def count(self, chunks):
        waiting.append(3 * (len(taken) - len(sent)))
        sent.extend(chunks)
        put(self, chunks)

    monkeypatch.setattr(flow_gpu.FlowBatches, "put", count)
    settings = flow_pipeline.Settings({"quality": 90})
    done = list(flow_gpu.extract_batched(jobs, settings, 1, 60, torch.device("cpu"), 4))
    assert sum(kind == "done" for _, kind, _ in done) == 40 and 16 <= max(waiting) < 16 + 3


# ---------------------------------------------------------------------------------------------------------------------
# Sharing between processes
# ---------------------------------------------------------------------------------------------------------------------
def test_processes_of_torchrun_share_the_gpus_and_the_cores(tmp_path, monkeypatch):
    make_set(tmp_path / "v", 1)
    asked, done = [], []
    monkeypatch.setattr(flow, "choose_device", lambda *args: asked.append(args[2]) or (torch.device("cpu"), None))
    monkeypatch.setattr(flow, "extract_all", lambda jobs, settings, workers, *_: done.append(workers) or {})
    monkeypatch.setattr(flow, "cores", lambda: 13)
    for local, world in ((3, 4), (0, 16)):
        monkeypatch.setenv("LOCAL_RANK", str(local))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world))
        assert flow.main(["--videos", str(tmp_path / "v"), "--out", str(tmp_path / "s")]) == 0
    assert asked == [3, 0] and done == [3, 1]


@pytest.mark.parametrize(("more", "pairs"), [(["--device", "cpu"], 4), (["--batch", "8"], 64)],
                         ids=["processes", "batches"])
def test_a_plan_takes_the_beginning_of_a_video(tmp_path, capsys, more, pairs):
    film(tmp_path / "v" / "long.avi", moving(80, 24, 24, 1, 0))
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL, "--plan", *more) == 0
    assert f"1 videos tried: {pairs} pairs, " in (said := capsys.readouterr().out)
    assert "1 videos to do: some 79 pairs" in said
