"""Clips through torch's DataLoader, when any file may crash the process that reads it or fill its memory.

Such a file ends a process of the loader and, with the DataLoader alone, a run of days. Here it costs a few seconds: the
video is from then on one that can't be read, and the processes start again at the batch that didn't come. Everything
random follows from (seed, epoch, index), so that batches are the same as if the file had been known for what it is.
"""

import ctypes
import gc
import os
import re
import signal
import time
from contextlib import contextmanager, suppress

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, default_convert, get_worker_info

from support.errors import BadInput, TemporaryFailure

SHARED_MEMORY = "/dev/shm"  # through which processes hand over tensors; 64 MB in a container of Docker's defaults
AHEAD = 2  # batches that each process may have ready, DataLoader's prefetch_factor


def keep_freed_memory():
    """Let the C library keep what is freed, where it is glibc: handed back and faulted in anew each time, its pages
    cost a third of the loader's time, and 18 % of a small network's on a CPU."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large array
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def start_worker(worker):
    """worker_init_fn of a DataLoader: the processes are the parallelism, and they end when the main process says so."""
    gc.freeze()  # what the main process left for its collector stays: a decoder waits here for threads that no fork has
    gc.enable()
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process still wants its step's data
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def begin(worker):
    """`start_worker` of a `Loader`'s process, which says that it has begun."""
    get_worker_info().dataset.begun[worker] = True
    start_worker(worker)


@contextmanager
def no_collection():
    """Nothing is collected in here, nor in a process that is forked here before `start_worker`."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def free_shared_memory():
    """Bytes that are free in shared memory, or None where the system keeps it elsewhere."""
    with suppress(OSError, AttributeError):
        stat = os.statvfs(SHARED_MEMORY)
        return stat.f_bavail * stat.f_frsize
    return None


def lack_of_shared_memory(reason):
    """BadInput that says how to have more."""
    return BadInput(f"too little shared memory for loader processes: {reason}. Start the container with more (docker "
                    f"run --shm-size=8g) or with the host's (--ipc=host), or read without processes (--workers 0)")


def share(item):
    """Move a process's tensors to shared memory here, where an exception reaches the caller: the thread of the queue
    that would do it later prints a traceback, and everybody waits for ever."""
    if isinstance(item, torch.Tensor):
        item.share_memory_()
    elif isinstance(item, dict):
        for value in item.values():
            share(value)
    elif isinstance(item, (list, tuple)):
        for value in item:
            share(value)
    return item


def collate_and_share(items):
    """collate_fn of a batch."""
    return share(default_collate(items)) if get_worker_info() else default_collate(items)


def convert_and_share(item):
    """collate_fn of a single item."""
    return share(default_convert(item)) if get_worker_info() else default_convert(item)


class Clips(Dataset):
    """A data set of `videos` that records in shared memory which video each process has open, for `Loader`."""

    time_limit = 60  # seconds that an item may take

    def __init__(self, videos):
        self.videos = videos
        self.opened = torch.zeros(0, 2, dtype=torch.int64)  # [processes, 2]: process or 0, index of its video
        self.begun = torch.zeros(0, dtype=torch.bool)  # [processes]
        self.ended = {}  # index of a video that ended a process -> a message

    def __len__(self):
        return len(self.videos)

    def item_bytes(self):
        """Bytes that an item takes, at least."""
        return 0

    @contextmanager
    def reading(self, index):
        """Raises BadInput if that video has ended a process before."""
        if index in self.ended:
            raise BadInput(self.ended[index])
        worker = get_worker_info()
        own = self.opened[worker.id] if worker and len(self.opened) else torch.zeros(2, dtype=torch.int64)
        own[1], own[0] = index, os.getpid()
        try:
            yield
        finally:
            own[0] = 0


class Loader:
    """Iterates as DataLoader(clips, num_workers=workers, **after(0), **how), and goes on where a process ends.

    clips: a `Clips`. after(done) -> the DataLoader's `sampler` or `batch_sampler`, and what belongs to it, once `done`
    of its items have come.
    Raises RuntimeError, torch's, where processes end without a batch between them: it is then not the files. Raises
    BadInput where shared memory is too small, TemporaryFailure where a batch takes several times what its items may
    take.
    """

    MAX_RESTARTS = 3
    LOOK_EVERY = 5  # seconds
    PATIENCE = 60  # seconds for a batch, beyond twice what its items may take
    START = 60  # seconds in which a process begins: what is forked from many threads may wait for one that it hasn't

    def __init__(self, clips, after, workers, **how):
        self.clips, self.after, self.workers, self.how = clips, after, workers, how

    def _dataloader(self, done):
        """-> (DataLoader from the `done`-th item on, seconds that it may give nothing)."""
        choice = self.after(done)
        batch = len(next(iter(choice["batch_sampler"]), ())) if "batch_sampler" in choice else choice["batch_size"]
        how = {"collate_fn": convert_and_share if batch is None else collate_and_share, **choice, **self.how}
        if self.workers:
            self._check_shared_memory(batch or 1)
            how |= {"prefetch_factor": AHEAD, "timeout": self.LOOK_EVERY}
        loader = DataLoader(self.clips, num_workers=self.workers, worker_init_fn=begin, **how)
        return loader, 2 * self.clips.time_limit * (batch or 1) + self.PATIENCE

    def _items(self, loader, limit):
        """What a DataLoader gives; TemporaryFailure where it gives nothing for `limit` seconds. At each of its own,
        shorter time-outs it looks whether its processes live, and can be asked again."""
        with no_collection():
            items, since = iter(loader), time.monotonic()
        start = since
        with suppress(ValueError):  # of another thread than the main one
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises in whatever is being done
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except (EOFError, ConnectionError) as e:  # a process that ends as it hands over what it made
                if "in DataLoader worker" in str(e):  # an exception of the work itself
                    raise
                continue  # torch says which it was, or in time that nothing comes
            except RuntimeError as e:
                if "DataLoader timed out" not in str(e):
                    raise
                if time.monotonic() - start > self.START:
                    self._end_those_not_begun(items)
                if time.monotonic() - since > limit:
                    raise TemporaryFailure(f"loader processes gave nothing for {limit:g} s; see whether the "
                                           f"videos' disk is well") from e
                continue
            yield item
            since = time.monotonic()

    def _end_those_not_begun(self, items):
        """End processes that hang where they were forked (in CPython's locks); then all start again."""
        for process, begun in zip(items._workers, self.clips.begun.tolist(), strict=True):
            if not begun:
                process.kill()

    def _check_shared_memory(self, batch):
        free, each = free_shared_memory(), batch * self.clips.item_bytes()
        if free is not None and AHEAD * self.workers * each > free:
            fit = free // (AHEAD * each)
            raise lack_of_shared_memory(
                f"{SHARED_MEMORY} has {free / 1e6:.0f} MB free, but each of {self.workers} has up to {AHEAD} batches "
                f"of {each / 1e6:.0f} MB ready{f' (--workers {fit} would fit)' if fit else ''}")

    def __iter__(self):
        done = ends = 0
        while True:
            self.clips.opened = torch.zeros(self.workers, 2, dtype=torch.int64)
            self.clips.begun = torch.zeros(self.workers, dtype=torch.bool)
            try:
                if self.workers:
                    self.clips.opened.share_memory_()
                    self.clips.begun.share_memory_()
                for item in self._items(*self._dataloader(done)):
                    yield item
                    done, ends = done + 1, 0
                return
            except RuntimeError as e:
                ends += 1
                self._explain(e, ends)

    def _explain(self, error, ends):
        """Leave word of the videos that ended their processes, `ends` times in a row, or raise what it was instead."""
        processes = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(error))
        if not processes or ends > self.MAX_RESTARTS:
            if "shared memory" in str(error):  # torch's words, in the last line of a process's traceback
                raise lack_of_shared_memory(str(error).strip().splitlines()[-1]) from error
            raise error
        for process, index in self.clips.opened.tolist():
            if str(process) in processes[1].split(", "):
                self.clips.ended[index] = (f"{self.clips.videos[index].path} ended the process that read it; "
                                           f"convert it, or see whether memory ran out")
