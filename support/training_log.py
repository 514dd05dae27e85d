"""RUN/log.jsonl and the terminal: what a run reports, and its warnings of collapse."""

import json
import os
import resource
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from support.distributed import (
    same_on_all_ranks,
)
from support.errors import BadInput
from support.files import atomic


def commit():
    """The repository's commit, for the log."""
    here = str(Path(__file__).parents[1])
    try:
        return subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True,
                              text=True).stdout.strip() or "unknown"
    except OSError:  # no git
        return "unknown"


def tensorboard_writer(folder, step):
    """A SummaryWriter of torch that hides what was written beyond `step`, of an earlier start, or BadInput."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # here: an optional dependency
    except ImportError as e:
        raise BadInput(f"--tensorboard needs the package tensorboard, which can't be imported ({e}): "
                       f"pip install tensorboard, or leave the flag out; log.jsonl holds the same numbers") from e
    return SummaryWriter(str(folder), purge_step=step + 1)


def peak_gib():
    """The most memory used so far, in GiB: of the GPU by torch, or of the process where there is none."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Log:
    """RUN/log.jsonl and the terminal: what happened since the last line, averaged. Only rank 0 writes.

    before: `state` of the start that is continued; the lines then are those of an uninterrupted run.
    """

    MAX_BAD_STEPS = 5  # steps without a finite gradient that end the run

    def __init__(self, out, s, rank, world, step, total, per_epoch, ln_n, before=None):
        self.path, self.s, self.head, self.world = out / "log.jsonl", s, rank == 0, world
        self.first, self.total, self.per_epoch, self.ln_n = step, total, per_epoch, ln_n
        before = before or {"losses": torch.empty(0), "dropped": 0, "row": 0, "faults": [], "most": 0}
        self.losses, self.finite, self.waited = [*before["losses"].unbind()], [], 0.0
        self.dropped, self.row, self.faults = before["dropped"], before["row"], dict.fromkeys(before["faults"])
        self.most = before["most"]  # prototypes ever in use
        self.videos = 0  # of all processes since the last line
        self.file = self.board = None
        self.began = self.since = time.perf_counter()

    def say(self, text):
        if self.head:
            print(text, flush=True)

    def start(self, header):
        """Drop the lines of steps that are about to be done again, then write the first line of this start.

        Rank 0 alone calls it. A file with other lines than ours is named and kept as log.damaged.jsonl. Raises BadInput
        where it can't be read.
        """
        if self.s.tensorboard:
            self.board = tensorboard_writer(self.path.parent / "tensorboard", self.first)
        kept, foreign = [], 0
        try:
            before = self.path.read_bytes() if self.path.exists() else b""
        except OSError as e:
            raise BadInput(f"{self.path} can't be read ({e.strerror}); move it out of the way") from e
        for raw in before.splitlines(keepends=True):
            try:
                line = json.loads(raw)
                if line["step"] <= self.first:
                    kept.append(json.dumps(line) + "\n")
            except (ValueError, TypeError, KeyError):  # ValueError: also bytes that are no text
                foreign += raw.endswith(b"\n")  # else it was being written when the run was killed
        if foreign:
            aside = self.path.with_suffix(".damaged.jsonl")
            print(f"warning: {self.path} has {foreign} damaged line(s), left out; the file as it was is {aside}",
                  file=sys.stderr)
            with atomic(aside) as tmp:
                tmp.write_bytes(before)
        with atomic(self.path) as tmp:
            tmp.write_text("".join(kept) + json.dumps(header) + "\n")
        self.file = open(self.path, "a", buffering=1)

    def state(self):
        """What the next line needs of the steps since the last, for the checkpoint; every process calls it."""
        losses = self._share()
        if self.file:
            os.fsync(self.file.fileno())  # not a line less than the checkpoint
        return {"losses": losses.cpu(), "dropped": self.dropped, "row": self.row, "faults": list(self.faults),
                "most": self.most}

    def _share(self):
        """Take over the faults of all processes -> the mean over them of each loss since the last line [k]."""
        losses = torch.stack([x.to(self.losses[-1].device) for x in self.losses]) if self.losses else torch.empty(0)
        if self.world > 1:
            everyone = [None] * self.world
            dist.all_gather_object(everyone, list(self.faults))
            self.faults = dict.fromkeys(fault for faults in everyone for fault in faults)
            if self.losses:
                dist.all_reduce(losses)
        return losses / self.world

    def timed(self, loader):
        """Pass the batches on and count the time spent waiting for them."""
        batches = iter(loader)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - began
            yield batch

    def add(self, loss, finite, faults, videos):
        """One batch: its loss, and whether the gradient of the step that it completes was finite (None: it completes
        none), both left on the device; its unreadable videos; the number of videos of all processes."""
        self.losses.append(loss.detach())
        if finite is not None:
            self.finite.append(finite)
        self.videos += videos
        for fault in faults:
            if fault and fault not in self.faults:
                self.faults[fault] = True
                print(f"skipped: {fault}", file=sys.stderr)

    def check_finite(self, step):
        """Count the steps whose gradient was dropped. Raises BadInput after MAX_BAD_STEPS in a row, before anything is
        saved. Every process sees the same gradients, so all of them raise."""
        for finite in torch.stack(self.finite).tolist() if self.finite else ():
            self.row = 0 if finite else self.row + 1
            self.dropped += not finite
        self.finite.clear()
        if self.row >= self.MAX_BAD_STEPS:
            raise same_on_all_ranks(BadInput(
                f"the gradient was not finite in the last {self.row} steps before step {step}; {self.path.parent} "
                f"keeps the last good checkpoint. Likely causes: a learning rate too high (--lr {self.s.lr:.3g}), too "
                f"small a lambda1 ({self.s.lambda1}), damaged weights"))

    def too_many_faults(self, videos):
        """A message if more than the share --max-faults of the videos could not be read (one never is too many)."""
        if len(self.faults) <= max(1, self.s.max_faults * videos):
            return None
        return (f"{len(self.faults)} of {videos} videos could not be read, more than --max-faults "
                f"{self.s.max_faults:g} allows; the first: {next(iter(self.faults))}. Mend them, or allow more; the "
                f"same command then continues")

    def line(self, step, values):
        """One line for the steps since the last; every process calls it: the loss is the mean over them, the faults are
        those of all."""
        loss = self._share().nanmean()
        now = time.perf_counter()
        line = {"step": step, "epoch": step / self.per_epoch, "loss": loss.item(), **values,
                "samples_per_s": self.videos / (now - self.since), "data_wait": self.waited / (now - self.since),
                "peak_gib": peak_gib(), "skipped": len(self.faults), "dropped": self.dropped}
        self.since, self.videos, self.waited = now, 0, 0.0
        self.losses.clear()
        if self.head:
            self.file.write(json.dumps(line) + "\n")
        if self.board:
            for name, value in line.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()
        left = timedelta(seconds=round((now - self.began) / (step - self.first) * (self.total - step)))
        agree = f"  views agree {line['views_agree']:.2f}" if "views_agree" in line else ""
        self.say(f"epoch {line['epoch']:.1f}/{self.s.epochs}  step {step}/{self.total}  loss {line['loss']:.3f}  "
                 f"entropy {line['entropy']:.2f}  in use {line['prototypes_in_use']}{agree}  lr {line['lr']:.3g}  "
                 f"{line['samples_per_s']:.1f} videos/s  waiting for data {line['data_wait']:.0%}  "
                 f"{line['peak_gib']:.1f} GiB  left {left}")
        for warning in self.collapse(line):
            self.say(f"  warning: {warning}")

    def collapse(self, line):
        """Messages about what a collapsed network looks like, once the warm-up is over."""
        self.most = max(self.most, line["prototypes_in_use"])
        if line["epoch"] <= self.s.warmup_epochs:
            return
        if line["loss"] > 1.05 * self.ln_n:
            yield (f"the loss, {line['loss']:.3f}, is above ln N = {self.ln_n:.3f}, which knowing nothing would give: "
                   f"the learning rate may be too high")
        elif line["loss"] > 0.99 * self.ln_n:
            yield f"the loss, {line['loss']:.3f}, is not below ln N = {self.ln_n:.3f}: the network has learned nothing"
        if line["rank"] < 2:
            yield f"the features of the batch have rank {line['rank']:.1f}: they are all but one vector"
        if line["prototypes_in_use"] <= max(2, self.most / 4):
            yield f"only {line['prototypes_in_use']} prototype(s) in use, of {self.most} before"

    def planned(self, step, kind, steps=4):
        """After a few steps (the first warms up) say how long all would take -> whether that is said."""
        done = step - self.first
        if done == 1:
            self.since = time.perf_counter()
        if done < steps and step < self.total:
            return False
        seconds = (time.perf_counter() - self.since) / max(1, done - 1)
        whole = timedelta(seconds=round(seconds * (self.total - self.first)))
        unit = "GPU-hours" if kind == "cuda" else "process-hours"
        self.say(f"a step takes {seconds:.2f} s, all that are left {whole} and "
                 f"{self.world * seconds * (self.total - self.first) / 3600:.1f} {unit}; nothing was written")
        return True

    def end(self, step):
        if step == self.first:
            self.say(f"{self.path.parent} is complete: {self.total} steps were done before")
        if self.dropped:
            self.say(f"{self.dropped} steps had a gradient that was not finite and changed nothing")
        if self.faults:
            print(f"{len(self.faults)} videos could not be read and were replaced; they are named above",
                  file=sys.stderr)
