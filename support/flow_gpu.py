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
from typing import NamedTuple

import numpy as np
import torch

from support.avi import AviWriter
from support.errors import BadInput
from support.flow_methods import make_solver
from support.flow_pipeline import Count, grey_frames, segments
from support.flow_progress import note
from support.stores import quantise_on_device
from support.worker_pool import MAX_CONSECUTIVE_FAILURES, one_line, run_in_processes

CHUNK_PAIRS = 32  # pairs that a decoder hands over at once
BATCH_PAIRS = 256  # pairs that a GPU computes at once: 2.2 GB at 340x256, twice; fewer where memory runs out
GROW_AFTER = 8  # batches without failure before twice as many pairs are tried again; doubled each time that fails
OWN_CONTEXT_BYTES = 2 ** 30  # CUDA itself takes up to about so much in each process
RETRY_SECONDS = (2, 10, 30, 60, 120)  # seconds to wait for memory that another job took


class Chunk(NamedTuple):
    """Consecutive frames that a decoder hands over; each chunk begins with the last frame of the one before."""
    frames: np.ndarray | None  # grey, uint8 [T, h, w]; None where their flow is there
    pairs: int  # T - 1; 0 where nothing is made of them
    expected: int  # pairs of the video
    rgb: int  # bytes written of its RGB since the last chunk


class FlowFile(NamedTuple):
    """All chunks of this file of flow were handed over."""
    path: str
    header: dict


def decode_chunks(job, settings, report):
    """Work of `run_in_processes`: reports each Chunk, and after those of a file the FlowFile -> the header of the
    video's last file."""
    about, rgb_sizes, count = {}, [], Count(job)

    def hand_over(segment, chunk):
        made = segment.flow or segment.rgb
        report(Chunk(np.stack(chunk) if segment.flow else None, len(chunk) - 1 if made else 0, count.expected(about),
                     sum(rgb_sizes)))
        rgb_sizes.clear()

    for segment in segments(job, settings, about):
        chunk = []
        for frame in grey_frames(segment, settings, rgb_sizes):
            chunk.append(frame)
            if len(chunk) > CHUNK_PAIRS:
                hand_over(segment, chunk)
                del chunk[:-1]
        if len(chunk) > 1:
            hand_over(segment, chunk)
        if segment.flow:
            path, _, header = segment.outputs()
            report(FlowFile(path, header))
        count.there += segment.there * (segment.count - 1)
    return about


class FileProgress:
    """A file of flow under way in `extract_batched`: a video's, or a segment's of a long one."""

    def __init__(self, video):
        self.video = video
        self.chunks, self.encoded = 0, []  # chunks that were decoded; AviWriters of those that are encoded
        self.output = None  # FlowFile, once all are decoded


class VideoProgress:
    """A video under way in `extract_batched`."""

    def __init__(self, name):
        self.name, self.dropped = name, False
        self.file, self.unwritten = FileProgress(self), 0  # the file that is decoded; files decoded but not written
        self.expected, self.rgb = 0, 0  # pairs; bytes of RGB not yet reported
        self.about = None  # header of its last file, once decoded


class MemoryLimit:
    """How much a GPU takes at once, in pixels of one frame of each pair: learned from what fails, and tried again."""

    def __init__(self, batch, name):
        self.batch, self.name, self.lock = batch, name, threading.Lock()
        self.most, self.printed = math.inf, math.inf  # pixels at once; the least of these that was printed
        self.largest = 0  # pixels of a pair
        # batches without failure; how many before more are tried; whether more are being tried
        self.successes, self.grow_after, self.grown = 0, GROW_AFTER, False

    def pairs(self, pixels):
        """Pairs of so many pixels to compute at once."""
        with self.lock:
            return int(max(1, min(self.batch, self.most / pixels)))

    def suffices(self, count, pixels):
        """Record that memory sufficed for `count` pairs."""
        with self.lock:
            self.largest, self.most = max(self.largest, pixels), max(self.most, count * pixels)
            if count < self.batch and 2 * count * pixels > self.most:
                self.successes += 1
                if self.successes >= self.grow_after:
                    self.most, self.successes, self.grown = 2 * self.most, 0, True

    def fails(self, count, size):
        """Record that memory did not suffice for `count` > 1 pairs of `size` (h, w)."""
        pixels = math.prod(size)
        with self.lock:
            if count * pixels > self.most:  # more than another thread has learned meanwhile
                return
            if self.grown:
                self.grow_after *= 2
            self.most, self.successes, self.grown = pixels * (count // 2), 0, False
            if self.most < self.printed:
                self.printed = self.most
                note(f"out of memory on {self.name}: {count // 2} pairs of {size[1]}x{size[0]} px at once from "
                     f"here on, more where that goes well")


class TooLarge(Exception):
    """A single pair does not fit in memory, though nothing else of ours is there; says what other jobs have."""


def other_jobs_bytes(device):
    """Memory of a GPU that other processes have, as far as that exceeds what any process takes for itself."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    taken = total - free - torch.cuda.memory_reserved(device)
    return taken if taken > OWN_CONTEXT_BYTES else 0


class FlowBatches:
    """The solver and encoders of `extract_batched`. `put` a batch, `get` its chunks, encoded, in the same order."""

    def __init__(self, settings, device, batch, threads):
        self.solve, self.device, self.quality = make_solver(settings), device, settings["quality"]
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.memory, self.closing = MemoryLimit(batch, self.name), threading.Event()
        self.too_large = 0  # batches in a row
        # two on a GPU, each with a stream: one copies while the other computes
        self.count = 2 if device.type == "cuda" else 1
        self.solvers, self.encoders = ThreadPoolExecutor(self.count), ThreadPoolExecutor(threads)
        self.next, self.free = threading.Lock(), threading.Semaphore(self.count)
        self.under_way, self.streams = deque(), threading.local()

    def put(self, chunks):
        """chunks: [(FileProgress, frames uint8 [T, h, w])] of one size."""
        self.under_way.append((chunks, self.solvers.submit(self.compute, [frames for _, frames in chunks])))

    def get(self):
        """-> [(FileProgress, AviWriter with its frames, or a message why not)] of the oldest batch."""
        chunks, future = self.under_way.popleft()
        return [(file, piece if isinstance(piece, str) else piece.result())
                for (file, _), piece in zip(chunks, future.result(), strict=True)]

    def compute(self, chunks):
        """Chunks, uint8 [T, h, w] -> for each a future of an AviWriter with its T-1 planes, or of a message, or a
        message. Raises BadInput after a fault of the GPU, or where it stays full."""
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
        except TooLarge as e:
            h, w = frames.shape[1:]
            self.too_large += 1
            if self.too_large == MAX_CONSECUTIVE_FAILURES:
                raise BadInput(f"{self.name} had no memory for any of {MAX_CONSECUTIVE_FAILURES} batches in a row "
                               f"({w}x{h} px); "
                               f"see whether another job has it, or take a smaller --short-side or --device cpu; "
                               f"the same command continues") from None
            return [f"has frames too large for the memory of {self.name} ({w}x{h} px){e}; take a smaller --short-side "
                    f"or --device cpu"] * len(chunks)
        except Exception as e:
            if self.device.type == "cuda":  # after a fault of the GPU nothing more can be computed there
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
            with self.device_turns(1):
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
    def device_turns(self, count):
        """Use the device as one of the threads or, with the `count` of all, as the only one."""
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
        """A pair that memory did not suffice for, while nothing else of ours is computed; where other jobs have
        memory of the GPU, after some waiting too. Raises TooLarge; BadInput if as large a one was computed before."""
        fitted = frames.shape[1:].numel() <= self.memory.largest
        with self.device_turns(self.count):
            part = self.attempt(frames, first)
            for pause in RETRY_SECONDS if fitted or other_jobs_bytes(self.device) else ():
                if part is None:
                    note(f"{self.name} is full; trying again in {pause} s")
                    if self.closing.wait(pause):
                        break
                    part = self.attempt(frames, first)
        if part is None and not fitted:
            others = other_jobs_bytes(self.device)
            raise TooLarge(f", of which other jobs have {others / 1e9:.1f} GB: the same command tries again"
                           if others else "")
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

    def write(self, path, file):
        """Write a file of flow, all of which is there -> None, or a message why not. path: of the video. Raises
        BadInput, as processes do, if that is the fault of the disk: then no other can be written."""
        writer = AviWriter(self.quality)
        for piece in file.encoded:
            writer.size = piece.size
            writer.jpegs += piece.jpegs
        try:
            writer.write(file.output.path, {**file.output.header, "device": self.name})
        except BadInput as e:
            if isinstance(e.__cause__, OSError):
                raise
            return str(e)
        except Exception as e:
            return f"{path} failed: {one_line(e)}"
        return None

    def close(self):
        self.closing.set()
        self.solvers.shutdown(cancel_futures=True)
        self.encoders.shutdown(cancel_futures=True)


class BatchedExtraction:
    """What `extract_batched` has under way. Its generators yield what `run_in_processes` does: (name, kind, value)."""

    def __init__(self, jobs, pool, batch):
        self.jobs, self.pool, self.batch = jobs, pool, batch
        self.videos, self.waiting = {}, {}  # {name: VideoProgress}, {size: [(FileProgress, chunk)]}
        self.writing = deque()  # (FileProgress, future of its file)

    def drop(self, video, message, kind="failed"):
        video.dropped, video.file.encoded = True, []
        return video.name, kind, message

    def finish(self, video):
        if video.about and not video.unwritten and not video.dropped:
            yield video.name, "done", self.videos.pop(video.name).about

    def write_if_whole(self, file):
        if file.output and len(file.encoded) == file.chunks:
            path = self.jobs[file.video.name].path
            self.writing.append((file, self.pool.encoders.submit(self.pool.write, path, file)))

    def take(self, name, kind, value):
        """What a decoding process says of a video."""
        video = self.videos.setdefault(name, VideoProgress(name))
        if video.dropped:
            return
        if kind in ("failed", "unavailable"):
            yield self.drop(video, value, kind)
        elif kind == "done":
            video.about = value
            yield from self.finish(video)
        else:
            yield from self.take_decoded(video, *value)

    def take_decoded(self, video, message):
        """A Chunk or FlowFile of a video."""
        if isinstance(message, FlowFile):
            file, video.file = video.file, FileProgress(video)
            file.output = message
            video.unwritten += 1
            self.write_if_whole(file)
            return
        video.expected, size = message.expected, None if message.frames is None else message.frames.shape[1:]
        video.rgb += message.rgb
        if size is None:  # its flow is there, only RGB was made
            yield video.name, "progress", (message.pairs, video.expected, 0, video.rgb)
            video.rgb = 0
            return
        video.file.chunks += 1
        self.waiting.setdefault(size, []).append((video.file, message.frames))
        if sum(len(x) - 1 for _, x in self.waiting[size]) >= self.batch:
            self.pool.put(self.waiting.pop(size))
        elif sum(len(x) - 1 for chunks in self.waiting.values() for _, x in chunks) >= 4 * self.batch:
            self.pool.put(self.waiting.pop(next(iter(self.waiting))))

    def take_encoded(self, file, piece):
        video = file.video
        if video.dropped:
            return
        if isinstance(piece, str):
            yield self.drop(video, f"{self.jobs[video.name].path} {piece}")
            return
        file.encoded.append(piece)
        yield video.name, "progress", (len(piece.jpegs), video.expected, sum(map(len, piece.jpegs)), video.rgb)
        video.rgb = 0
        self.write_if_whole(file)

    def take_written(self, file, message):
        file.encoded = []
        file.video.unwritten -= 1
        if message and not file.video.dropped:
            yield self.drop(file.video, message)
        yield from self.finish(file.video)

    def proceed(self, most, wait=False):
        """Take in what is ready, and wait until no more than `most` batches are under way and, if `wait`, all files
        are written."""
        under_way = self.pool.under_way
        while len(under_way) > most or (under_way and under_way[0][1].done()):
            for file, piece in self.pool.get():
                yield from self.take_encoded(file, piece)
        while self.writing and (wait or self.writing[0][1].done()):
            file, future = self.writing.popleft()
            yield from self.take_written(file, future.result())

    def last(self):
        """Nothing more will be decoded."""
        for chunks in self.waiting.values():
            self.pool.put(chunks)
        yield from self.proceed(0, wait=True)


def extract_batched(jobs, settings, workers, time_limit, device, batch):
    """As `run_in_processes` of `extract_in_worker`, with the flow of many videos computed together on `device`.

    workers: processes that decode, and threads that encode. batch: pairs at once, of frames of one size. At most a few
    batches are under way or wait for frames of their size; beyond that the decoders wait.
    Raises BadInput as `run_in_processes`, and where the device fails or stays full.
    """
    pool = FlowBatches(settings.flow, device, batch, workers)
    extraction = BatchedExtraction(jobs, pool, batch)
    try:
        for name, kind, value in run_in_processes(decode_chunks, jobs, settings, workers, time_limit):
            yield from extraction.take(name, kind, value)
            yield from extraction.proceed(3)
        yield from extraction.last()
    finally:
        pool.close()
