"""What becomes of a run whose processes hang or are lost: each ends with a message and status 75."""

import os
import sys
import threading
import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch.distributed as dist

from support.cli import command_line
from support.errors import EXIT_LOST


class Watchdog:
    """Ends this process, with a message and status LOST, where no step is finished within `seconds`.

    It counts the seconds in which this process runs, so one stopped by Ctrl-Z and continued has lost nothing. It works
    where the main thread waits in a collective for a process that hangs, in NCCL or in gloo, and in that process too.
    """

    COMPILING = 5  # times the limit for a step that torch.compile first compiles

    def __init__(self, seconds, rank, step, advice):
        self.seconds, self.limit, self.rank, self.step, self.advice = seconds, seconds, rank, step, advice
        self.waited, self.over = 0.0, threading.Event()

    def __enter__(self):
        self.main = threading.get_ident()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.over.set()

    def compiling(self):
        """The step that begins compiles first."""
        self.limit = self.COMPILING * self.seconds

    def beat(self, step):
        """Step `step` (from 1) is done."""
        self.waited, self.step, self.limit = 0.0, step, self.seconds

    def _watch(self):
        tick = min(1.0, self.seconds / 4)
        while not self.over.wait(tick):
            self.waited += tick
            if self.waited > self.limit:
                root = Path(__file__).parents[1]
                stack = traceback.extract_stack(sys._current_frames()[self.main])
                own = [f for f in stack if Path(f.filename).is_relative_to(root)
                       and "site-packages" not in f.filename] or stack
                print(f"error: process {self.rank} did not finish step {self.step + 1} in {self.limit:g} s "
                      f"(--timeout); it is at {Path(own[-1].filename).name}:{own[-1].lineno}, in {stack[-1].name}. "
                      f"{self.advice}", file=sys.stderr, flush=True)
                os._exit(EXIT_LOST)  # the main thread may be out of reach


def is_peer_failure(error):
    """Whether an exception says that another process ended, or did not come, while this one waited for it."""
    words = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "gloo",
             "socket timeout", "nccl error", "ncclremoteerror", "nccl communicator was aborted",
             "watchdog caught collective operation timeout")
    return isinstance(error, dist.DistError) or any(w in str(error).lower() for w in words)


@contextmanager
def exit_on_error():
    """An exception of a process in a group is printed at once, and ends the process: NCCL's way to end a group may wait
    for the others, who wait for this one."""
    try:
        yield
    except BaseException as error:
        if not dist.is_initialized():
            raise
        status = 1
        try:
            command_line(partial(_raise, error))
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


@contextmanager
def end_process_group():
    """What ends this block ends the process group."""
    with exit_on_error():
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


def _raise(error):
    raise error
