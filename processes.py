"""One training run in several processes: how they start, what they share in a step, and what becomes of a hung one.

Processes come from torchrun, or from anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
(presets/slurm.sh). They share the unit features of the assigning crops (`gather_rows`, one all-gather), the statistics
of batch norm, and the gradients, which DistributedDataParallel averages.
"""

import inspect
import os
import sys
import threading
import traceback
import warnings
from collections import deque
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import data
import workers

_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 renamed it
LOST = os.EX_TEMPFAIL  # 75: status of a process that waited in vain for the others; the same command continues


# ---------------------------------------------------------------------------------------------------------------------
# Start
# ---------------------------------------------------------------------------------------------------------------------
def start_processes(s):
    """Join the process group if there is one -> (device, rank, world).

    s.device: "auto", "cpu" or "cuda". s.timeout, where there is one: see `Watchdog`; the group's own limit is twice the
    most that a step may take, for what happens before and after the steps.
    Raises BadInput where there is no GPU, or none for this process.
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
        here = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if here > torch.cuda.device_count():
            error = data.BadInput(f"{here} processes on this machine want a GPU each, but torch sees "
                                  f"{torch.cuda.device_count()} of them; start fewer, or make all GPUs visible to all")
            raise alike(error) if "LOCAL_WORLD_SIZE" in os.environ else error
        torch.cuda.set_device(device)
    rank, world = place()
    if world > 1:
        limit = getattr(s, "timeout", None)
        if getattr(s, "compile", False):
            limit *= Watchdog.COMPILING
        where = _fresh_store(rank, world)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", **where,
                                timeout=None if limit is None else timedelta(seconds=2 * limit))
    return device, rank, world


def place():
    """(rank, world) as the launcher says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def cores_for_one():
    """Cores for each process of this machine: srun binds a process to its share, torchrun lets all use all."""
    cores = workers.cores()
    if "SLURM_PROCID" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
        return max(1, min(cores, int(os.environ.get("SLURM_CPUS_PER_TASK", cores))))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


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
# What all do alike
# ---------------------------------------------------------------------------------------------------------------------
def alike(error):
    """A BadInput that every process raises: the first of each machine says it."""
    error.said = int(os.environ.get("LOCAL_RANK", 0)) > 0
    return error


def everywhere(function):
    """function() of each process -> its value. Where it raises BadInput in some, all raise the first one's."""
    value = error = None
    try:
        value = function()
    except data.BadInput as e:
        error = e
    if not dist.is_initialized():
        if error:
            raise error
        return value
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, error and (str(error), error.status))
    bad = [rank for rank, told in enumerate(every) if told]
    if not bad:
        return value
    text, status = every[bad[0]]
    if bad != [0] and len(bad) < len(every):
        text += f" (process {', '.join(map(str, bad))} of {len(every)})"
    common = data.BadInput(text)
    common.status, common.said = status, dist.get_rank() != bad[0]
    raise common from error


def from_first(function):
    """function() of process 0 -> its value in every process; BadInput likewise."""
    value = everywhere(lambda: function() if place()[0] == 0 else None)
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def check_same(facts):
    """Raise BadInput, naming the processes, where `facts` (a dict of plain values) are not the same in all."""
    if not dist.is_initialized():
        return
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, facts)
    others = [f"process {rank}: {', '.join(f'{k} {other[k]}, not {v}' for k, v in every[0].items() if other[k] != v)}"
              for rank, other in enumerate(every) if other != every[0]]
    if others:
        error = data.BadInput(f"the processes were not started alike ({'; '.join(others)}): give all the same command, "
                              f"and let all see the same files")
        error.said = dist.get_rank() > 0
        raise error


class Agreement:
    """Numbers that each process may have in another step -> in every process the same, the largest of all.

    On a CPU those of this call. On GPUs those of the call before, so that the host need not wait for the device: it
    only sees to it that it is less than one step ahead.
    """

    def __init__(self, device, world, late=None):
        self.device, self.world = device, world
        self.late = device.type == "cuda" if late is None else late
        self.pending = deque()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" and world > 1 else None

    def __call__(self, *numbers):
        """Every process calls it in every step, with integers -> as many."""
        if self.world == 1:
            return list(numbers)
        # filled on the device: a copy from pageable memory would wait for it
        mine = torch.stack([torch.full((), n, dtype=torch.int32, device=self.device) for n in numbers])
        work = dist.all_reduce(mine, dist.ReduceOp.MAX, async_op=True)
        self.pending.append(self._to_host(mine, work) if self.stream else (mine, work))
        if len(self.pending) <= self.late:
            return [0] * len(numbers)
        largest, work = self.pending.popleft()
        work.synchronize() if self.stream else work.wait()
        return largest.tolist()

    def _to_host(self, largest, work):
        """-> pinned memory, and the event after which it holds the result; the steps' stream waits for neither."""
        on_host = torch.empty(largest.shape, dtype=largest.dtype, pin_memory=True)
        with torch.cuda.stream(self.stream):
            work.wait()  # the stream, not the host
            on_host.copy_(largest, non_blocking=True)
            largest.record_stream(self.stream)
            return on_host, self.stream.record_event()


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


def share_gradients(net, device, find_unused_parameters=False):
    """Let the backward pass average the gradients over the processes -> a DistributedDataParallel.

    The buffers stay each process's own: batch norm shares what it has to.
    """
    ddp = nn.parallel.DistributedDataParallel
    # torch 2.13 has a new name for it, and a warning from every process about the old one
    name = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in inspect.signature(ddp).parameters)
    return ddp(net, device_ids=[device] if device.type == "cuda" else None,
               find_unused_parameters=find_unused_parameters, **{name: False})


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
                here = Path(__file__).parent
                stack = traceback.extract_stack(sys._current_frames()[self.main])
                own = [f for f in stack if Path(f.filename).parent == here] or stack
                print(f"error: process {self.rank} did not finish step {self.step + 1} in {self.limit:g} s "
                      f"(--timeout); it is at {Path(own[-1].filename).name}:{own[-1].lineno}, in {stack[-1].name}. "
                      f"{self.advice}", file=sys.stderr, flush=True)
                os._exit(LOST)  # the main thread may be out of reach


def is_lost(error):
    """Whether an exception says that another process ended, or did not come, while this one waited for it."""
    words = ("connection closed by peer", "connection reset by peer", "broken pipe", "timed out waiting", "gloo",
             "socket timeout", "nccl error", "ncclremoteerror", "nccl communicator was aborted",
             "watchdog caught collective operation timeout")
    return isinstance(error, dist.DistError) or any(w in str(error).lower() for w in words)


@contextmanager
def leaving():
    """What ends this block ends the process group; an exception of a process in it is said at once, and ends the
    process: NCCL's way to end a group may wait for the others, who wait for this one."""
    try:
        yield
    except BaseException as error:
        if not dist.is_initialized():
            raise
        status = 1
        try:
            data.command_line(partial(_raise, error))
        except SystemExit as e:
            status = e.code if isinstance(e.code, int) else 1
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    if dist.is_initialized():
        dist.destroy_process_group()


def _raise(error):
    raise error
