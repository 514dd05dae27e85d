"""How far flow.py is, how long it will take and how large the stores will be."""

import sys
import time
from datetime import timedelta

import numpy as np
from tqdm import tqdm

from support.cli import say


def note(line):
    """Print a line above the bar, where there is one."""
    with tqdm.external_write_mode(file=sys.stdout):
        say(line)


class Progress:
    """Counts, pairs a second and estimates: a bar on a terminal, else a line after 10 s and then every 30 s."""

    def __init__(self, total, processes=1, parts=1):
        """total: videos, each of which so many jobs share (`parts`)."""
        self.total, self.processes, self.parts = total, processes, parts
        self.videos = self.pairs = self.first = self.flow = self.rgb = 0
        self.computed = 0  # pairs of which there is flow now; where RGB alone is made, frames only pass
        self.expected = {}  # pairs, by job
        self.bar = tqdm(total=100, disable=None, file=sys.stdout, bar_format="{percentage:3.0f}%|{bar:20}| {desc}")
        self.interval = 30 if self.bar.disable else 0.5
        self.began, self.start, self.next = time.monotonic(), None, None

    def add(self, job, pairs, expected, flow, rgb):
        """So many more pairs of a job, which has about `expected`, and their bytes."""
        self.pairs += pairs
        self.computed += pairs if flow else 0
        self.flow += flow
        self.rgb += rgb
        # the clock leaves out the start of the processes
        if job not in self.expected and len(self.expected) < min(self.processes, self.total * self.parts):
            self.start, self.first = time.monotonic(), self.pairs
            self.next = self.next or self.start + min(10, self.interval)
        self.expected[job] = expected

    def rate(self):
        pairs, since = (self.pairs - self.first, self.start) if self.pairs > self.first else (self.pairs, self.began)
        return pairs / (time.monotonic() - since)

    def estimate(self, total):
        """-> pairs of `total` videos such as these, their bytes of flow and of RGB."""
        pairs = max(self.pairs, np.mean(list(self.expected.values())) * total * self.parts)
        return pairs, pairs / self.pairs * self.flow, pairs / self.pairs * self.rgb

    def show(self):
        now = time.monotonic()
        if self.next is None or now < self.next or self.pairs <= self.first:
            return
        self.next = now + self.interval
        (pairs, *size), rate = self.estimate(self.total), self.rate()
        left = timedelta(seconds=round((pairs - self.pairs) / rate))
        what = "pairs" if self.computed else "frames"
        line = (f"{self.videos} of {self.total} videos, {self.pairs} of some {pairs:.0f} {what}, {rate:.1f} {what}/s, "
                f"{left} left, {sum(size) / 1e6:.0f} MB in the end")
        if self.bar.disable:
            say(line)
        else:
            self.bar.n = 100 * self.pairs / pairs
            self.bar.set_description_str(line)
