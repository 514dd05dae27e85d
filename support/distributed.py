"""Several processes of one run: how they start, what they must have alike, and what they share in a step.

Processes come from torchrun, or from anything that sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT
(launch/slurm.sh). They share the unit features of the assigning crops (`gather_rows`, one all-gather), the statistics
of batch norm (batch_norm.py), and the gradients, which DistributedDataParallel averages.
"""

import inspect
import os
import warnings
from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from support import worker_pool
from support.errors import BadInput
from support.loader import keep_freed_memory
from support.watchdog import Watchdog

GROUP_TIMEOUT = 1800.0  # seconds that processes wait for one another where no stage says otherwise: torch's own

_gather_flat = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13 renamed it


def start_processes(s):
    """Join the process group if there is one -> (device, rank, world).

    s.device: "auto", "cpu" or "cuda". s.timeout, where there is one: see `Watchdog`; the group's own limit is twice the
    most that a step may take, for what happens before and after the steps.
    Raises BadInput where there is no GPU, or none for this process.
    """
    kind = s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda, but torch sees no GPU (torch.cuda.is_available() is false)")
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cpu":
        keep_freed_memory()
        # the strides of dimensions of size 1, which nothing reads
        warnings.filterwarnings("ignore", "(?s).*Grad strides do not match bucket view strides")
    if kind == "cuda":
        here = max(local + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        if here > torch.cuda.device_count():
            error = BadInput(f"{here} processes on this machine want a GPU each, but torch sees "
                             f"{torch.cuda.device_count()} of them; start fewer, or make all GPUs visible to all")
            raise same_on_all_ranks(error) if "LOCAL_WORLD_SIZE" in os.environ else error
        torch.cuda.set_device(device)
    rank, world = rank_and_world()
    if world > 1:
        limit = getattr(s, "timeout", None)
        if getattr(s, "compile", False):
            limit *= Watchdog.COMPILING
        where = _fresh_store(rank, world)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", **where,
                                timeout=None if limit is None else timedelta(seconds=2 * limit))
    return device, rank, world


def rank_and_world():
    """(rank, world) as the launcher says."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def cores_per_process():
    """Cores for each process of this machine: srun binds a process to its share, torchrun lets all use all."""
    cores = worker_pool.cores()
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


def same_on_all_ranks(error):
    """A BadInput that every process raises: the first of each machine says it."""
    error.printed = int(os.environ.get("LOCAL_RANK", 0)) > 0
    return error


def run_on_all_ranks(function):
    """function() of each process -> its value. Where it raises BadInput in some, all raise the first one's."""
    value = error = None
    try:
        value = function()
    except BadInput as e:
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
    common = BadInput(text)
    common.status, common.printed = status, dist.get_rank() != bad[0]
    raise common from error


def run_on_first_rank(function):
    """function() of process 0 -> its value in every process; BadInput likewise."""
    value = run_on_all_ranks(lambda: function() if rank_and_world()[0] == 0 else None)
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def check_same_on_all_ranks(facts):
    """Raise BadInput, naming the processes, where `facts` (a dict of plain values) are not the same in all."""
    if not dist.is_initialized():
        return
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, facts)
    others = [f"process {rank}: {', '.join(f'{k} {other[k]}, not {v}' for k, v in every[0].items() if other[k] != v)}"
              for rank, other in enumerate(every) if other != every[0]]
    if others:
        error = BadInput(f"the processes were not started alike ({'; '.join(others)}): give all the same command, "
                         f"and let all see the same files")
        error.printed = dist.get_rank() > 0
        raise error


class MaxOverRanks:
    """Numbers that each process may have in another step -> in every process the same, the largest of all.

    On a CPU those of this call. On GPUs, also on one alone, those of the call before, so that the host need not wait
    for the device: it only sees to it that it is less than one step ahead.
    """

    def __init__(self, device, world, late=None):
        self.device, self.world = device, world
        self.late = device.type == "cuda" if late is None else late
        self.pending = deque()
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *numbers):
        """Every process calls it in every step, with integers, or such on the device -> as many integers."""
        if self.world == 1 and not self.late:
            return [int(n) for n in numbers]
        # filled on the device: a copy from pageable memory would wait for it
        mine = torch.stack([n.to(torch.int32) if isinstance(n, torch.Tensor) else
                            torch.full((), n, dtype=torch.int32, device=self.device) for n in numbers])
        work = dist.all_reduce(mine, dist.ReduceOp.MAX, async_op=True) if self.world > 1 else None
        self.pending.append(self._to_host(mine, work) if self.stream else (mine, work))
        if len(self.pending) <= self.late:
            return [0] * len(numbers)
        largest, work = self.pending.popleft()
        if self.stream:
            work.synchronize()
        elif work:
            work.wait()
        return largest.tolist()

    def _to_host(self, largest, work):
        """-> pinned memory, and the event after which it holds the result; the steps' stream waits for neither."""
        on_host = torch.empty(largest.shape, dtype=largest.dtype, pin_memory=True)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))  # not the host
        with torch.cuda.stream(self.stream):
            if work:
                work.wait()  # the stream, too
            on_host.copy_(largest, non_blocking=True)
            largest.record_stream(self.stream)
            return on_host, self.stream.record_event()


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


def data_parallel(net, device, find_unused_parameters=False):
    """Let the backward pass average the gradients over the processes -> a DistributedDataParallel.

    The buffers stay each process's own: batch norm shares what it has to.
    """
    ddp = nn.parallel.DistributedDataParallel
    # torch 2.13 has a new name for it, and a warning from every process about the old one
    name = next(n for n in ("forward_sync_buffers", "broadcast_buffers") if n in inspect.signature(ddp).parameters)
    return ddp(net, device_ids=[device] if device.type == "cuda" else None,
               find_unused_parameters=find_unused_parameters, **{name: False})
