"""Clips through torch's DataLoader, when any file may crash the process that reads it or fill its memory.

Such a file ends a process of the loader and, with the DataLoader alone, a run of days. Here it costs a few seconds: the
video is from then on one that can't be read, and the processes start again at the batch that didn't come. Everything
random follows from (seed, epoch, index), so that batches are the same as if the file had been known for what it is.
"""

import ctypes
import os
import re
import signal
from contextlib import contextmanager, suppress

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from support.errors import BadInput


def keep_freed_memory():
    """Let the C library keep what is freed, where it is glibc: handed back and faulted in anew each time, its pages
    cost a third of the loader's time, and 18 % of a small network's on a CPU."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own for a large array
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def start_worker(worker):
    """worker_init_fn of a DataLoader: the processes are the parallelism, and they end when the main process says so."""
    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process still wants its step's data
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Clips(Dataset):
    """A data set of `videos` that leaves word of which video each process has open, for `Loader`."""

    def __init__(self, videos):
        self.videos = videos
        self.opened = torch.zeros(0, 2, dtype=torch.int64)  # [processes, 2]: process or 0, index of its video
        self.ended = {}  # index of a video that ended a process -> a message

    def __len__(self):
        return len(self.videos)

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
    Raises RuntimeError, torch's, where processes end without a batch between them: it is then not the files.
    """

    MAX_RESTARTS = 3

    def __init__(self, clips, after, workers, **how):
        self.clips, self.after, self.workers, self.how = clips, after, workers, how

    def __iter__(self):
        done = ends = 0
        while True:
            self.clips.opened = torch.zeros(self.workers, 2, dtype=torch.int64).share_memory_()
            items = iter(DataLoader(self.clips, **self.after(done), num_workers=self.workers,
                                    worker_init_fn=start_worker, **self.how))
            with suppress(ValueError):  # of another thread than the main one
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises in whatever is being done
            try:
                for item in items:
                    yield item
                    done, ends = done + 1, 0
                return
            except RuntimeError as e:
                processes = re.search(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)", str(e))
                ends += 1
                if not processes or ends > self.MAX_RESTARTS:
                    raise
                for process, index in self.clips.opened.tolist():
                    if str(process) in processes[1].split(", "):
                        self.clips.ended[index] = (f"{self.clips.videos[index].path} ended the process that read it; "
                                                   f"convert it, or see whether memory ran out")
