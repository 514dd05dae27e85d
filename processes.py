"""One training run in several processes: how they start, what they share in a step, and what becomes of a hung one.

Processes come from torchrun, or from anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
(presets/slurm.sh). They share the unit features of the assigning crops (`gather_rows`, one all-gather), the statistics
of batch norm, and the gradients, which DistributedDataParallel averages.
"""

import os
import sys
import threading
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import data

_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 renamed it
LOST = os.EX_TEMPFAIL  # 75: status of a process that waited in vain for the others; the same command continues


# ---------------------------------------------------------------------------------------------------------------------
# Start
# ---------------------------------------------------------------------------------------------------------------------
def start_processes(s):
    """Join the process group if there is one -> (device, rank, world).

    s.device: "auto", "cpu" or "cuda". s.timeout, where there is one: see `Watchdog`; the group's own limit is twice
    that, for what happens before and after the steps.
    """
    kind = s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise data.BadInput("--device cuda, but torch sees no GPU (torch.cuda.is_available() is false)")
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cpu":
        data.keep_memory()
        # the strides of dimensions of size 1, which nothing reads
        warnings.filterwarnings("ignore", "(?s).*Grad strides do not match bucket view strides")
    if kind == "cuda":
        torch.cuda.set_device(device)
    rank, world = place()
    if world > 1:
        limit = getattr(s, "timeout", None)
        where = _fresh_store(rank, world)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", **where,
                                timeout=None if limit is None else timedelta(seconds=2 * limit))
    return device, rank, world


def place():
    """(rank, world) as the launcher says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _fresh_store(rank, world):
    """Where the processes of a second start on one machine meet: without --standalone torchrun hands them the store of
    the first one, in which they would find the addresses of dead processes (torch 2.13)."""
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1"
    if start == "0" or not agent:
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return {"store": dist.PrefixStore(f"start {start}", store), "rank": rank, "world_size": world}


# ---------------------------------------------------------------------------------------------------------------------
# What a step shares
# ---------------------------------------------------------------------------------------------------------------------
def gather_rows(features, rows=None):
    """The unit features of all processes, their samples in rank order: [G, A, m, d] -> [G, A, M, d], no gradient.

    rows: the number m of each process, where they differ; each then sends as many as the largest.
    """
    features = features.detach().contiguous()
    if not dist.is_initialized():
        return features
    rows = rows or [features.shape[2]] * dist.get_world_size()
    padded = features.new_zeros(*features.shape[:2], max(rows), features.shape[3])
    padded[:, :, :features.shape[2]] = features
    parts = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(parts, padded)
    return torch.cat([part[:, :, :m] for part, m in zip(parts, rows, strict=True)], dim=2)


class _Normalise(torch.autograd.Function):
    """Batch norm by the statistics of all processes: one all-gather forward, one all-reduce backward.

    x [B, C, ...] of this process, of any B. -> normalised x, mean [C], biased variance [C], number of elements [1].
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        dims = [0, *range(2, x.ndim)]
        var, mean = torch.var_mean(x, dims, correction=0)
        own = torch.cat([mean, var, mean.new_full((1,), x.numel() / x.shape[1])])
        every = own.new_empty(dist.get_world_size(), len(own))
        dist.all_gather(list(every), own)
        means, variances, counts = every.split([len(mean), len(mean), 1], dim=1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        # about the common mean (Chan et al.): nothing cancels, as in a difference of squares
        var = (counts * (variances + (means - mean).square())).sum(0) / total
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, total)
        return nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), mean, var, total

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, mean, var, total = ctx.saved_tensors
        # as if mean and variance were constants; the two sums over samples are the gradients of weight and bias
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, mean, var, None, None, False, ctx.eps, [True, True, True])
        sums = torch.stack([dweight, dbias])
        dist.all_reduce(sums)
        # dx = weight / sigma (grad - mean(grad) - xhat mean(grad xhat)), xhat = (x - mean) / sigma
        sigma = (var + ctx.eps).sqrt()
        slope = -weight / sigma.square() * sums[0] / total
        shift = -weight / sigma * sums[1] / total - slope * mean
        shape = (1, -1, *[1] * (x.ndim - 2))
        return dx.add_(torch.addcmul(shift.view(shape), x, slope.view(shape))), dweight, dbias, None


class _NormaliseOnGpu(torch.autograd.Function):
    """The same by torch's kernels for GPUs, which read bfloat16 and sum in float32. Its SyncBatchNorm calls them too,
    but asks first which processes have no samples, and the host waits for the answer; here all have some.

    x [B, C, ...] of this process, of any B; the running statistics are updated. -> normalised x.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        x = _dense(x)
        mean, invstd = torch.batch_norm_stats(x, eps)
        own = torch.cat([mean, invstd, mean.new_full((1,), x.numel() // x.shape[1])])
        every = own.new_empty(dist.get_world_size() * len(own))
        _gather_flat(every, own)
        means, invstds, counts = every.view(-1, len(own)).split([len(mean), len(mean), 1], dim=1)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(x, means, invstds, running_mean, running_var, momentum,
                                                                 eps, counts.flatten())
        ctx.save_for_backward(x, weight, mean, invstd, counts.to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, invstd, counts = ctx.saved_tensors
        grad = _dense(grad)
        *sums, dweight, dbias = torch.batch_norm_backward_reduce(grad, x, mean, invstd, weight, True, True, True)
        sums = torch.stack(sums)  # over this process's samples of grad, and of grad (x - mean)
        dist.all_reduce(sums)
        dx = torch.batch_norm_backward_elemt(grad, x, mean, invstd, weight, *sums, counts)
        return dx, dweight, dbias, None, None, None, None


def _dense(x):
    """x as the kernels want it: channels last, or contiguous."""
    return x if x.is_contiguous(memory_format=torch.channels_last_3d) else x.contiguous()


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over all processes' samples, without waiting for the device; each process has some."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        if x.device.type == "cuda":
            self.num_batches_tracked.add_(1)
            return _NormaliseOnGpu.apply(x, self.weight, self.bias, self.running_mean, self.running_var, self.momentum,
                                         self.eps)
        y, mean, var, total = _Normalise.apply(x, self.weight, self.bias, self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * total / (total - 1), self.momentum)
            self.num_batches_tracked += 1
        return y


def synchronise_batch_norm(net):
    """Let every batch norm see the whole batch, as one process would."""
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.__class__ = GlobalBatchNorm  # same parameters and buffers
    return net


# ---------------------------------------------------------------------------------------------------------------------
# Hung and lost processes
# ---------------------------------------------------------------------------------------------------------------------
class Watchdog:
    """Ends this process, with a sentence and status LOST, where no step is finished within `seconds`.

    It counts the seconds in which this process runs, so one stopped by Ctrl-Z and continued has lost nothing. It works
    where the main thread waits in a collective for a process that hangs, in NCCL or in gloo, and in that process too.
    """

    def __init__(self, seconds, rank, step, advice):
        self.seconds, self.rank, self.step, self.advice = seconds, rank, step, advice
        self.waited, self.over = 0.0, threading.Event()

    def __enter__(self):
        self.main = threading.get_ident()
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.over.set()

    def beat(self, step):
        """Step `step` (from 1) is done."""
        self.waited, self.step = 0.0, step

    def _watch(self):
        tick = min(1.0, self.seconds / 4)
        while not self.over.wait(tick):
            self.waited += tick
            if self.waited > self.seconds:
                here = Path(__file__).parent
                stack = traceback.extract_stack(sys._current_frames()[self.main])
                own = [f for f in stack if Path(f.filename).parent == here] or stack
                print(f"error: process {self.rank} did not finish step {self.step + 1} in {self.seconds:g} s "
                      f"(--timeout); it is at {Path(own[-1].filename).name}:{own[-1].lineno}, in {stack[-1].name}. "
                      f"{self.advice}", file=sys.stderr, flush=True)
                os._exit(LOST)  # the main thread may be out of reach


def is_lost(error):
    """Whether an exception says that another process ended, or did not come, while this one waited for it."""
    words = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "gloo")
    return isinstance(error, dist.DistError) or any(w in str(error).lower() for w in words)
