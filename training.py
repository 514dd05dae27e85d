"""What every training run needs: the optimizer of the paper, several processes, an orderly stop, a log.

Used by pretrain.py and evaluate.py; the method is not here.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

import data


# ---------------------------------------------------------------------------------------------------------------------
# Optimisation
# ---------------------------------------------------------------------------------------------------------------------
class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step for each weight is scaled by trust |w| / |g + wd w| (You et al. [91]).

    Batch norm and biases (one dimension) get neither the scaling nor weight decay.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=1e-6, trust=0.001):
        params = list(params)
        groups = [{"params": [p for p in params if p.ndim > 1], "adapt": True},
                  {"params": [p for p in params if p.ndim <= 1], "adapt": False}]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            update = [p.grad for p in params]
            if group["adapt"]:
                update = torch._foreach_add(update, params, alpha=group["weight_decay"])
                w, g = torch._foreach_norm(params), torch._foreach_norm(update)
                ratio = [torch.where((a > 0) & (b > 0), group["trust"] * a / b, 1.0) for a, b in zip(w, g, strict=True)]
                torch._foreach_mul_(update, ratio)
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, update)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])


@torch.no_grad()
def drop_if_not_finite(params):
    """Take all gradients for zero if one of them is not finite -> whether all were, a tensor on their device.

    Nothing waits for the device: the caller reads the answers when it logs.
    """
    params = [p for p in params if p.grad is not None]
    finite = torch.stack(torch._foreach_norm([p.grad for p in params])).sum().isfinite()
    for p in params:
        p.grad = torch.where(finite, p.grad, 0.0)
    return finite


def learning_rate(step, steps_per_epoch, s):
    """Linear warm-up from lr_start to lr, then a cosine to lr_end (section 4); `step` counts from 0."""
    warm, total = s.warmup_epochs * steps_per_epoch, s.epochs * steps_per_epoch
    if step < warm:
        return s.lr_start + (s.lr - s.lr_start) * step / warm
    done = (step - warm) / max(1, total - warm - 1)
    return s.lr_end + (s.lr - s.lr_end) * (1 + math.cos(math.pi * done)) / 2


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------
class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over all processes' samples on the CPU, where torch's SyncBatchNorm does not run."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        dims = [0, *range(2, x.ndim)]
        count = x.numel() / x.shape[1] * dist.get_world_size()
        mean = all_reduce(x.sum(dims)) / count
        centred = x - mean.view(1, -1, *[1] * (x.ndim - 2))
        var = all_reduce(centred.square().sum(dims)) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach(), self.momentum)
            self.running_var.lerp_(var.detach() * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = (self.weight / (var + self.eps).sqrt()).view(1, -1, *[1] * (x.ndim - 2))
        return centred * scale + self.bias.view(1, -1, *[1] * (x.ndim - 2))


def synchronise_batch_norm(net, device):
    """Let every batch norm see the whole batch, as one process would."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.__class__ = GlobalBatchNorm  # same parameters and buffers
    return net


def start_processes(s):
    """Join the process group if torchrun started us -> (device, rank, world)."""
    kind = s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise data.BadInput("--device cuda, but torch sees no GPU (torch.cuda.is_available() is false)")
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cpu":
        data.keep_memory()
    if kind == "cuda":
        torch.cuda.set_device(device)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    return device, int(os.environ.get("RANK", 0)), world


def gather_rows(features):
    """The unit features of all processes, their samples in rank order: [G, A, m, d] -> [G, A, M, d], no gradient."""
    features = features.detach().contiguous()
    if not dist.is_initialized():
        return features
    parts = [torch.empty_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, features)
    return torch.cat(parts, dim=2)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping and logging
# ---------------------------------------------------------------------------------------------------------------------
class Stop:
    """Ctrl-C, SIGTERM and SIGUSR1 (Slurm's warning) ask for a checkpoint after this step; a second Ctrl-C ends all."""

    def __enter__(self):
        self.signal = 0
        self.before = {sig: signal.signal(sig, self) for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *exception):
        for sig, handler in self.before.items():
            signal.signal(sig, handler)

    def __call__(self, sig, frame):
        if self.signal and sig == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = sig

    def asked(self, device, world):
        """The signal that came, or 0; processes may get it in different steps, so they agree on it."""
        if world == 1:
            return self.signal
        agreed = torch.tensor(self.signal, device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return int(agreed)


def commit():
    """The repository's commit, for the log."""
    here = str(Path(__file__).parent)
    try:
        return subprocess.run(["git", "-C", here, "describe", "--always", "--dirty"], capture_output=True,
                              text=True).stdout.strip() or "unknown"
    except OSError:  # no git
        return "unknown"


class Log:
    """RUN/log.jsonl and the terminal: what happened since the last line, averaged. Only rank 0 writes."""

    IN_A_ROW = 5  # steps without a finite gradient that end the run

    def __init__(self, out, s, rank, world, step, total, per_epoch, ln_n):
        self.path, self.s, self.head, self.world = out / "log.jsonl", s, rank == 0, world
        self.first, self.total, self.per_epoch, self.ln_n = step, total, per_epoch, ln_n
        self.losses, self.finite, self.faults, self.waited, self.step = [], [], {}, 0.0, step
        self.dropped = self.row = 0

    def say(self, text):
        if self.head:
            print(text, flush=True)

    def start(self, header):
        """Drop the lines of steps that are about to be done again, then write the first line of this start."""
        self.began = self.since = time.perf_counter()
        if not self.head:
            return
        kept = []
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                if json.loads(line)["step"] <= self.first:
                    kept.append(line + "\n")
            except ValueError:
                pass  # the line that was being written when the run was killed
        with data.atomic(self.path) as tmp:
            tmp.write_text("".join(kept) + json.dumps(header) + "\n")
        self.file = open(self.path, "a", buffering=1)

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

    def add(self, loss, finite, faults):
        """One step: its loss, and whether its gradient was finite, both left on the device; its unreadable videos."""
        self.losses.append(loss.detach())
        self.finite.append(finite)
        for fault in faults:
            if fault and fault not in self.faults:
                self.faults[fault] = True
                print(f"skipped: {fault}", file=sys.stderr)

    def check_finite(self, step):
        """Count the steps whose gradient was dropped. Raises BadInput after IN_A_ROW in a row, before anything is
        saved. Every process sees the same gradients, so all of them raise."""
        for finite in torch.stack(self.finite).tolist() if self.finite else ():
            self.row = 0 if finite else self.row + 1
            self.dropped += not finite
        self.finite.clear()
        if self.row >= self.IN_A_ROW:
            raise data.BadInput(f"the gradient was not finite in the last {self.row} steps before step {step}; "
                                f"{self.path.parent} keeps the last good checkpoint. Likely causes: a learning rate "
                                f"too high (--lr {self.s.lr:.3g}), too small a lambda1 ({self.s.lambda1}), damaged "
                                f"weights")

    def too_many_faults(self, videos):
        """A sentence if more than the share --max-faults of the videos could not be read (one never is too many)."""
        if len(self.faults) <= max(1, self.s.max_faults * videos):
            return None
        return (f"{len(self.faults)} of {videos} videos could not be read, more than --max-faults "
                f"{self.s.max_faults:g} allows; the first: {next(iter(self.faults))}. Mend them, or allow more; the "
                f"same command then continues")

    def line(self, step, values):
        """One line for the steps since the last; every process calls it: the loss is the mean over them, the faults are
        those of all."""
        loss = torch.stack(self.losses).nanmean()
        if self.world > 1:
            dist.all_reduce(loss)
            everyone = [None] * self.world
            dist.all_gather_object(everyone, list(self.faults))
            self.faults = dict.fromkeys(fault for faults in everyone for fault in faults)
        now = time.perf_counter()
        videos = (step - self.step) * self.s.batch_size * self.world
        line = {"step": step, "epoch": step / self.per_epoch, "loss": loss.item() / self.world, **values,
                "samples_per_s": videos / (now - self.since), "data_wait": self.waited / (now - self.since),
                "skipped": len(self.faults), "dropped": self.dropped}
        self.since, self.step, self.waited = now, step, 0.0
        self.losses.clear()
        if self.head:
            self.file.write(json.dumps(line) + "\n")
        left = timedelta(seconds=round((now - self.began) / (step - self.first) * (self.total - step)))
        agree = f"  views agree {line['views_agree']:.2f}" if "views_agree" in line else ""
        self.say(f"epoch {line['epoch']:.1f}/{self.s.epochs}  step {step}/{self.total}  loss {line['loss']:.3f}  "
                 f"entropy {line['entropy']:.2f}  in use {line['prototypes_in_use']}{agree}  lr {line['lr']:.3g}  "
                 f"{line['samples_per_s']:.1f} videos/s  waiting for data {line['data_wait']:.0%}  left {left}")
        for warning in self.collapse(line):
            self.say(f"  warning: {warning}")

    def collapse(self, line):
        """Sentences about what a collapsed network looks like, once the warm-up is over."""
        if line["epoch"] <= self.s.warmup_epochs:
            return
        if line["loss"] > 0.99 * self.ln_n:
            yield f"the loss is still ln N = {self.ln_n:.3f}, what a network says that has learned nothing"
        if line["rank"] < 2:
            yield f"the features of the batch have rank {line['rank']:.1f}: they are all but one vector"
        if line["prototypes_in_use"] <= 2:
            yield f"only {line['prototypes_in_use']} prototype(s) in use"

    def planned(self, step, steps=4):
        """After a few steps (the first warms up) say how long all would take -> whether that is said."""
        done = step - self.first
        if done == 1:
            self.since = time.perf_counter()
        if done < steps and step < self.total:
            return False
        seconds = (time.perf_counter() - self.since) / max(1, done - 1)
        whole = timedelta(seconds=round(seconds * (self.total - self.first)))
        self.say(f"a step takes {seconds:.2f} s, all that are left {whole} and "
                 f"{self.world * seconds * (self.total - self.first) / 3600:.1f} device-hours; nothing was written")
        return True

    def end(self, step):
        if step == self.first:
            self.say(f"{self.path.parent} is complete: {self.total} steps were done before")
        if self.dropped:
            self.say(f"{self.dropped} steps had a gradient that was not finite and changed nothing")
        if self.faults:
            print(f"{len(self.faults)} videos could not be read and were replaced; they are named above",
                  file=sys.stderr)
