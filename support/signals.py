"""Signals that ask a run to stop, and the clock that asks it to save."""

import os
import signal
import time


class StopSignals:
    """Ctrl-C, SIGTERM and SIGUSR1 (Slurm's warning) ask for a checkpoint after this step; a second Ctrl-C ends all.

    Second is one that comes a second later: torchrun hands a Ctrl-C, which the terminal sent to all, to all once more.
    The end of torchrun asks too (SIGUSR1 ends it alone): without it nobody would look after its processes.
    """

    def __enter__(self):
        self.came, self.first = 0, 0.0
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.before = {sig: signal.signal(sig, self) for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *exception):
        for sig, handler in self.before.items():
            signal.signal(sig, handler)

    def __call__(self, sig, frame):
        if not self.came:
            self.first = time.monotonic()
        elif sig == signal.SIGINT and time.monotonic() - self.first > 1:
            raise KeyboardInterrupt
        self.came = sig

    @property
    def signal(self):
        """The signal that came, or 0; SIGHUP for the end of torchrun. Processes may get it in different steps."""
        if not self.came and self.parent is not None and os.getppid() != self.parent:
            self.came = int(signal.SIGHUP)
        return self.came


class IntervalTimer:
    """Says once every so many minutes that time is up."""

    def __init__(self, minutes):
        self.seconds, self.since = 60 * minutes, time.monotonic()

    def __call__(self):
        """Whether it is; the next interval then begins. 0 minutes: never."""
        if not self.seconds or time.monotonic() - self.since < self.seconds:
            return False
        self.since = time.monotonic()
        return True
