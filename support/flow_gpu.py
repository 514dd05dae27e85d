"""Flow of many videos at once on a GPU: processes decode, two threads hand the GPU batches of pairs of several
videos, threads encode, all three at the same time.

The bytes are those of flow_pipeline.py where the flow is the same. Files may crash or stall their decoder: that is why
decoders are processes (worker_pool.py).
"""

import itertools
import math
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import numpy as np
import torch

from support.avi import AviWriter
from support.cli import say
from support.errors import BadInput
from support.flow_methods import make_solver
from support.flow_pipeline import cut_short_message, expected_pairs, grey_frames
from support.stores import quantise_on_device
from support.worker_pool import MAX_CONSECUTIVE_FAILURES, one_line, run_in_processes

CHUNK_PAIRS = 32  # pairs that a decoder hands over at once
BATCH_PAIRS = 256  # pairs that a card computes at once: 2.2 GB at 340x256, twice; fewer where memory runs out
GROW_AFTER = 8  # batches that go well before twice as many pairs are tried again; doubled each time that fails
RETRY_SECONDS = (2, 10, 30, 60, 120)  # seconds to wait for memory that another job took


def decode_chunks(job, settings, report):
    """Work of `run_in_processes`: tells (grey frames uint8 [T, h, w] or None, T pairs or T-1, pairs expected, bytes
    of RGB), each chunk beginning with the last frame of the one before -> the header of the video's files."""
    about, chunk, rgb_sizes = {}, [], []

    def hand_over():
        report(np.stack(chunk) if job.flow else None, len(chunk) - 1, expected_pairs(about), sum(rgb_sizes))
        rgb_sizes.clear()

    for frame in grey_frames(job, settings, about, rgb_sizes):
        chunk.append(frame)
        if len(chunk) > CHUNK_PAIRS:
            hand_over()
            del chunk[:-1]
    if len(chunk) > 1:
        hand_over()
    return about


class VideoProgress:
    """A video under way in `extract_batched`."""

    def __init__(self, name):
        self.name, self.dropped = name, False
        self.chunks, self.encoded = 0, []  # chunks that were decoded; AviWriters of those that are encoded
        self.expected, self.rgb, self.about = 0, 0, None  # pairs; bytes of RGB not yet told; header, once decoded


class MemoryLimit:
    """How much a card takes at once, in pixels of one frame of each pair: learned from what fails, and tried again."""

    def __init__(self, batch, name):
        self.batch, self.name, self.lock = batch, name, threading.Lock()
        self.most, self.printed = math.inf, math.inf  # pixels at once; the least of these that was printed
        self.largest = 0  # pixels of a pair
        self.well, self.patience, self.grown = 0, GROW_AFTER, False  # batches since; how many before more; was it tried

    def pairs(self, pixels):
        """Pairs of so many pixels to compute at once."""
        with self.lock:
            return int(max(1, min(self.batch, self.most / pixels)))

    def suffices(self, count, pixels):
        """It did, for `count` pairs."""
        with self.lock:
            self.largest, self.most = max(self.largest, pixels), max(self.most, count * pixels)
            if count < self.batch and 2 * count * pixels > self.most:
                self.well += 1
                if self.well >= self.patience:
                    self.most, self.well, self.grown = 2 * self.most, 0, True

    def fails(self, count, size):
        """It did not, for `count` > 1 pairs of `size` (h, w)."""
        pixels = math.prod(size)
        with self.lock:
            if count * pixels > self.most:  # more than another thread has learned meanwhile
                return
            if self.grown:
                self.patience *= 2
            self.most, self.well, self.grown = pixels * (count // 2), 0, False
            if self.most < self.printed:
                self.printed = self.most
                say(f"\nout of memory on {self.name}: {count // 2} pairs of {size[1]}x{size[0]} px at once from "
                    f"here on, more where that goes well")


class TooLarge(Exception):
    """A single pair does not fit in memory, though nothing else is there."""


class FlowBatches:
    """The solver and encoders of `extract_batched`. `put` a batch, `get` its chunks, encoded, in the same order."""

    def __init__(self, settings, device, batch, threads):
        self.solve, self.device, self.quality = make_solver(settings), device, settings["quality"]
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.memory, self.closing = MemoryLimit(batch, self.name), threading.Event()
        self.too_large = 0  # batches in a row
        # two on a card, each with a stream: one copies while the other computes
        self.count = 2 if device.type == "cuda" else 1
        self.solvers, self.encoders = ThreadPoolExecutor(self.count), ThreadPoolExecutor(threads)
        self.next, self.free = threading.Lock(), threading.Semaphore(self.count)
        self.under_way, self.streams = deque(), threading.local()

    def put(self, chunks):
        """chunks: [(film, frames uint8 [T, h, w])] of one size."""
        self.under_way.append((chunks, self.solvers.submit(self.compute, [frames for _, frames in chunks])))

    def get(self):
        """-> [(film, AviWriter with its frames, or a message why not)] of the oldest batch."""
        chunks, future = self.under_way.popleft()
        return [(film, piece if isinstance(piece, str) else piece.result())
                for (film, _), piece in zip(chunks, future.result(), strict=True)]

    def compute(self, chunks):
        """Chunks, uint8 [T, h, w] -> for each a future of an AviWriter with its T-1 planes, or of a message, or a
        message. Raises BadInput after a fault of the card, or where it stays full."""
        frames = torch.from_numpy(np.concatenate(chunks))
        lengths = [len(chunk) for chunk in chunks]
        firsts = [at for end, n in zip(itertools.accumulate(lengths), lengths, strict=True)
                  for at in range(end - n, end - 1)]
        try:
            if self.device.type == "cuda":
                if not hasattr(self.streams, "own"):
                    self.streams.own = torch.cuda.Stream(self.device)
                with torch.cuda.stream(self.streams.own):
                    result = self.in_parts(frames, torch.tensor(firsts))
            else:
                result = self.in_parts(frames, torch.tensor(firsts))
        except BadInput:
            raise
        except TooLarge:
            h, w = frames.shape[1:]
            self.too_large += 1
            if self.too_large == MAX_CONSECUTIVE_FAILURES:
                raise BadInput(f"{self.name} had no memory for any of {MAX_CONSECUTIVE_FAILURES} batches in a row "
                               f"({w}x{h} px); "
                               f"see whether another job has it, or take a smaller --short-side or --device cpu; "
                               f"the same command continues") from None
            return [f"has frames too large for the memory of {self.name} ({w}x{h} px); take a smaller --short-side or "
                    f"--device cpu"] * len(chunks)
        except Exception as e:
            if self.device.type == "cuda":  # after a fault of the card nothing more can be computed there
                raise BadInput(f"{self.name} failed ({' '.join(str(e).split())}); the same command continues, "
                               f"--device cpu does without it") from e
            return [f"failed: {one_line(e)}"] * len(chunks)
        self.too_large = 0
        pieces = result.split([n - 1 for n in lengths])
        return [self.encoders.submit(self.encode, piece.numpy()) for piece in pieces]

    def in_parts(self, frames, firsts):
        """Planes uint8 [P, 2h, w] of the pairs that begin at `firsts`, in parts that memory suffices for."""
        parts, at, size = [], 0, frames.shape[1:]
        while at < len(firsts):
            first = firsts[at:at + self.memory.pairs(size.numel())]
            with self.turns(1):
                part = self.attempt(frames, first)
            if part is None and len(first) == 1:
                part = self.alone(frames, first)
            if part is None:
                self.memory.fails(len(first), size)
            else:
                self.memory.suffices(len(first), size.numel())
                parts.append(part)
                at += len(first)
        return torch.cat(parts)

    @contextmanager
    def turns(self, count):
        """Be one of the threads that use the device or, with the `count` of all, the only one."""
        with self.next:
            for _ in range(count):
                self.free.acquire()
        try:
            yield
        finally:
            for _ in range(count):
                self.free.release()

    def attempt(self, frames, first):
        """Planes uint8 [P, 2h, w], on the CPU, of the pairs that begin at `first`; None out of memory."""
        def compute():
            some = frames[first[0]:first[-1] + 2].to(self.device)
            at = (first - first[0]).to(self.device)
            return quantise_on_device(self.solve(torch.stack([some[at], some[at + 1]], dim=1))).cpu()

        with suppress(torch.OutOfMemoryError):
            return compute()
        if self.device.type == "cuda":  # out here nothing holds what failed
            torch.cuda.empty_cache()
        return None

    def alone(self, frames, first):
        """A pair that memory did not suffice for, while nothing else is computed. Raises TooLarge; or BadInput, if as
        large a one was computed before and waiting doesn't help: then it is another job that has the memory."""
        with self.turns(self.count):
            part = self.attempt(frames, first)
            if part is None and frames.shape[1:].numel() > self.memory.largest:
                raise TooLarge
            for pause in RETRY_SECONDS:
                if part is None:
                    say(f"\n{self.name} is full; trying again in {pause} s")
                    if self.closing.wait(pause):
                        break
                    part = self.attempt(frames, first)
        if part is None:
            raise BadInput(f"{self.name} is full: another job has its memory; the same command continues, once "
                           f"there is some")
        return part

    def encode(self, piece):
        """Planes [P, 2h, w] -> an AviWriter with them, or a message why not."""
        writer = AviWriter(self.quality)
        try:
            for plane in piece:
                writer.add(plane)
        except Exception as e:
            return f"failed: {one_line(e)}"
        return writer

    def write(self, job, film):
        """Write the file of a video's flow, all of which is there -> None, or a message why not. Raises BadInput, as
        processes do, if that is the fault of the disk: then no other can be written."""
        writer = AviWriter(self.quality)
        for piece in film.encoded:
            writer.size = piece.size
            writer.jpegs += piece.jpegs
        try:
            if job.flow:
                writer.write(job.flow, {**film.about, "device": self.name})
        except BadInput as e:
            if isinstance(e.__cause__, OSError):
                raise
            return str(e)
        except Exception as e:
            return f"{job.path} failed: {one_line(e)}"
        return None

    def close(self):
        self.closing.set()
        self.solvers.shutdown(cancel_futures=True)
        self.encoders.shutdown(cancel_futures=True)


def extract_batched(jobs, settings, workers, time_limit, device, batch):
    """As `run_in_processes` of `work`, with the flow of many videos computed together on `device`.

    workers: processes that decode, and threads that encode. batch: pairs at once, of frames of one size. At most a few
    batches are under way or wait for frames of their size; beyond that the decoders wait.
    Raises BadInput as `run_in_processes`, and where the device fails or stays full.
    """
    films, waiting, writing = {}, {}, deque()  # {name: Film}, {size: [(Film, chunk)]}, (Film, future of its file)
    pool = FlowBatches(settings.flow, device, batch, workers)

    def drop(film, message, kind="failed"):
        film.dropped, film.encoded = True, []
        return film.name, kind, message

    def proceed(most, wait=False):
        """Take in what is ready, and wait until no more than `most` batches are under way and, if `wait`, all files
        are written."""
        while len(pool.under_way) > most or (pool.under_way and pool.under_way[0][1].done()):
            for film, piece in pool.get():
                if film.dropped:
                    continue
                if isinstance(piece, str):
                    yield drop(film, f"{jobs[film.name].path} {piece}")
                    continue
                film.encoded.append(piece)
                yield film.name, "progress", (len(piece.jpegs), film.expected, sum(map(len, piece.jpegs)), film.rgb)
                film.rgb = 0
                write_if_whole(film)
        while writing and (wait or writing[0][1].done()):
            film, future = writing.popleft()
            message = future.result()
            del films[film.name]
            if message:
                yield film.name, "failed", message
            else:
                message = None if settings.limit else cut_short_message(jobs[film.name].path, film.about)
                yield film.name, "done", message

    def write_if_whole(film):
        if film.about and len(film.encoded) == film.chunks:
            writing.append((film, pool.encoders.submit(pool.write, jobs[film.name], film)))

    try:
        for name, kind, value in run_in_processes(decode_chunks, jobs, settings, workers, time_limit):
            film = films.setdefault(name, VideoProgress(name))
            if film.dropped:
                pass
            elif kind in ("failed", "unavailable"):
                yield drop(film, value, kind)
            elif kind == "done":
                film.about = value
                write_if_whole(film)
            else:
                frames, pairs, film.expected, rgb = value
                film.rgb += rgb
                if frames is None:  # its flow is there, only RGB was made
                    yield name, "progress", (pairs, film.expected, 0, film.rgb)
                    film.rgb = 0
                else:
                    film.chunks += 1
                    waiting.setdefault(frames.shape[1:], []).append((film, frames))
                    if sum(len(x) - 1 for _, x in waiting[frames.shape[1:]]) >= batch:
                        pool.put(waiting.pop(frames.shape[1:]))
                    elif sum(len(x) - 1 for chunks in waiting.values() for _, x in chunks) >= 4 * batch:
                        pool.put(waiting.pop(next(iter(waiting))))
            yield from proceed(3)
        for chunks in waiting.values():
            pool.put(chunks)
        yield from proceed(0, wait=True)
    finally:
        pool.close()
