"""RUN/log.jsonl and the terminal: what a run reports, and its warnings of collapse."""

import json
import math
import os
import resource
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from support.errors import BadInput
from support.files import atomic, writing
from support.optim import rate_rule


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


def crops_in_words(s):
    return f"2 crops of {s.frames} and {s.short_crops} of {s.short_frames} frames, {s.size} px"


def views_in_words(s):
    return "both views" if len(s.views) == 2 else f"one view, {s.views[0]}"


def against_out_of_memory(s):
    """What was asked for, and what helps, for an error message."""
    return (f"--batch-size {s.batch_size}, each video in {views_in_words(s)} of {crops_in_words(s)}. What helps: "
            f"--recompute (a third more time, the same result), --batch-size {max(1, s.batch_size // 2)} --accumulate "
            f"{2 * s.accumulate} (each half is assigned by itself; a new run), fewer --short-crops, --short-frames or "
            f"--frames, a smaller --size")


def plan(s, found, videos, net, batches, start, device, world, operator):
    """What a run is about to do, in a few lines. found: a VideoSet, videos: those of it that are used."""
    n, batch, total = len(net.prototypes), s.batch_size * world, batches.steps_per_epoch * s.epochs
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    stores = [*(["flow"] if "flow" in s.views else []), *(["RGB"] if s.rgb and "rgb" in s.views else [])]
    without = f", {len(found.videos) - len(videos)} without {' or '.join(stores)}" if stores else ""
    decoded = f", {len(found.faulty)} that do not decode" if s.index else ""  # without one nothing was read yet
    rest = f"and one of {batches.rest}" if batches.rest else f"{len(videos) % batch} videos left out of each"
    return (
        f"{s.method} on {s.dataset} in {s.videos if 'rgb' in s.views else s.flow}: {len(videos)} videos "
        f"({len(found.absent)} listed but absent{decoded}{without}); {views_in_words(s)} of {crops_in_words(s)}; "
        f"{s.workers} loader processes"
        f"{' for each process' if world > 1 else ''}\n"
        + "".join(f"{note}\n" for note in found.notes) +
        f"{s.arch}, width {s.width:g}, {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, "
        f"{'bfloat16, assignment and loss float32' if device.type == 'cuda' else 'float32'} on {world} x {kind}; "
        f"assignment and loss: {operator}\n"
        f"{n} prototypes, ln N = {math.log(n):.3f}; batch {s.batch_size} x {world}"
        f"{f' x {s.accumulate} accumulated' if s.accumulate > 1 else ''}, {batches.steps_per_epoch} steps an epoch, "
        f"{total} in all ({s.epochs} epochs, {rest})\n"
        f"{rate_rule(s, batch * s.accumulate)}{f'; continuing at step {start}' if start else ''}"
        + (f"\ntiming {min(4, total - start)} steps, or one if that takes longer than {Log.LONG_STEP} s; the first "
           f"waits for the videos" if s.plan and start < total else ""))


class Log:
    """RUN/log.jsonl and the terminal: what happened since the last line, averaged. Only rank 0 writes.

    before: `state` of the start that is continued; the lines then are those of an uninterrupted run.
    """

    PATIENCE = 2  # epochs, or a third of all: what lasts longer than that beyond the warm-up is worth a warning

    def __init__(self, out, s, rank, world, step, total, per_epoch, ln_n, before=None):
        self.path, self.s, self.head, self.world = out / "log.jsonl", s, rank == 0, world
        self.first, self.total, self.per_epoch, self.ln_n = step, total, per_epoch, ln_n
        before = before or {"losses": torch.empty(0), "dropped": 0, "row": 0, "faults": [], "most": 0}
        self.losses, self.waited = [*before["losses"].unbind()], 0.0
        self.dropped, self.row = before["dropped"], before["row"]  # bad steps: all, and in a row; `Run` counts them
        self.faults = dict.fromkeys(before["faults"])
        self.most = before["most"]  # prototypes ever in use
        self.since_epoch = dict(before.get("since", {}))  # sign of collapse -> epoch in which it began
        self.warned = dict.fromkeys(before.get("warned", []))  # signs that were said; each is said once
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
            with writing(self.path):
                os.fsync(self.file.fileno())  # not a line less than the checkpoint
        return {"losses": losses.cpu(), "dropped": self.dropped, "row": self.row, "faults": list(self.faults),
                "most": self.most, "since": self.since_epoch, "warned": list(self.warned)}

    def entries(self):
        """What a checkpoint holds of it; every process calls it."""
        return {"log": self.state()}

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

    def add(self, loss, faults, videos):
        """One batch: its loss, left on the device; why videos of it were skipped; the number of videos of all."""
        self.losses.append(loss.detach())
        self.videos += videos
        for fault in faults:
            if fault and fault not in self.faults:
                self.faults[fault] = True
                print(f"skipped: {fault}", file=sys.stderr)

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
            with writing(self.path):
                self.file.write(json.dumps(line) + "\n")
        if self.board:
            for name, value in line.items():
                if name != "prior_views":  # no number
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
        """Messages about what a collapsed network looks like, each once.

        Every run starts near ln N, or above it, with features near one vector, and healthy ones may stay there for a
        third of a short run; so these are said only where they last.
        """
        self.most = max(self.most, line["prototypes_in_use"])
        patience = max(self.PATIENCE, self.s.epochs / 3)
        signs = self._signs(line) if line["epoch"] > self.s.warmup_epochs else {}
        for sign in [sign for sign in self.since_epoch if sign not in signs]:
            del self.since_epoch[sign]
        for sign, (lasts, message) in signs.items():
            since = self.since_epoch.setdefault(sign, line["epoch"])
            if sign not in self.warned and line["epoch"] - since >= (patience if lasts else 0):
                self.warned[sign] = True
                yield message

    def _signs(self, line):
        """{sign of collapse: (whether it has to last, message)}."""
        signs = {}
        if line["loss"] > 1.05 * self.ln_n:
            signs["loss above ln N"] = True, (
                f"the loss, {line['loss']:.3f}, stays above ln N = {self.ln_n:.3f}, which knowing nothing would give: "
                f"the learning rate may be too high")
        elif line["loss"] > 0.99 * self.ln_n:
            signs["loss at ln N"] = True, (
                f"the loss, {line['loss']:.3f}, stays at ln N = {self.ln_n:.3f}: the network has learned nothing; a "
                f"lower --lr, more videos a batch, or fewer prototypes than videos a batch may help")
        names = ("rgb", "flow") if "effective_rank_rgb" in line else ("",)
        ranks = {name: line[f"effective_rank_{name}" if name else "rank"] for name in names}
        for name in (name for name, rank in ranks.items() if rank < 2):
            signs[f"rank {name}"] = True, (
                f"{f'the features of {name}' if name else 'the features'} have collapsed: they have stayed at "
                f"effective rank {ranks[name]:.1f} since epoch {self.since_epoch.get(f'rank {name}', 0):.0f}; "
                f"{self._against(name, ranks)}")
        if line["prototypes_in_use"] <= max(2, self.most / 4):
            used = ", ".join(f"{line[key]} in {name}" for name in names if (key := f"prototypes_in_use_{name}") in line)
            signs["prototypes"] = False, (
                f"only {line['prototypes_in_use']} prototype(s) in use{f' ({used})' if used else ''}, of {self.most} "
                f"before: a lower --lr may help, or fewer prototypes")
        return signs

    def _against(self, name, ranks):
        """What helps a view `name` whose features have collapsed."""
        slower = "a lower --lr and more --epochs"
        if self.s.method != "goca" or not name:
            return f"{slower} may help"
        if max(ranks.values()) < 2:
            return (f"so have the other view's: each may have been taught by the other before it knew anything; "
                    f"{slower}, --lead flow, --still-jitter 1.5 or fewer prototypes may help")
        other = "flow" if name == "rgb" else "rgb"
        leads = f"--lead {other} with more --lead-epochs" if self.s.lead == other else f"--lead {other} --lead-epochs E"
        return f"{other} has learned and this view not: {slower}, or {leads} may help"

    LONG_STEP = 20  # seconds: a plan then times no second step

    def planned(self, step, kind, steps=4):
        """After a few steps (the first warms up) say how long all would take -> whether that is said."""
        done = step - self.first
        if done == 1:
            self.since, first = time.perf_counter(), time.perf_counter() - self.began
            if first > self.LONG_STEP or step == self.total:
                self._say_plan(first, kind, ", timed on the first one alone")
                return True
        if done < steps and step < self.total:
            return False
        self._say_plan((time.perf_counter() - self.since) / (done - 1), kind)
        return True

    def _say_plan(self, seconds, kind, how=""):
        whole = timedelta(seconds=round(seconds * (self.total - self.first)))
        unit = "GPU-hours" if kind == "cuda" else "process-hours"
        self.say(f"a step takes {seconds:.2f} s{how}, all that are left {whole} and "
                 f"{self.world * seconds * (self.total - self.first) / 3600:.1f} {unit}; nothing was written")
        if kind == "cpu" and seconds > self.LONG_STEP:
            self.say("what makes a run on a CPU bearable: @presets/cpu, or a smaller --size, --frames, --width and "
                     "--batch-size, and --short-crops 0")

    def end(self, step):
        if step == self.first:
            self.say(f"{self.path.parent} is complete: {self.total} steps were done before")
        if self.dropped:
            self.say(f"{self.dropped} steps had a gradient that was not finite and changed nothing")
        if self.faults:
            print(f"{len(self.faults)} videos could not be read and were replaced; they are named above",
                  file=sys.stderr)
