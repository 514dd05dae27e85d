"""What a step of pre-training keeps in memory, reckoned before it is taken."""

import os
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks

import model
from support.errors import BadInput
from support.training_log import against_out_of_memory

CGROUP = "/sys/fs/cgroup"  # v2: the limits of a container


def activation_bytes(s, prototypes, videos=2):
    """Bytes of activations that the forward pass of one video keeps for the backward pass, in float32, of a run's
    settings `s` and prototypes [N, d]. Nothing is computed: the pass is made on torch's meta device."""
    frozen = model.VIEWS[1] if s.method == "vicc" else None  # keeps nothing; RGB's turn keeps the more
    kept = {}

    def keep(t):
        kept[t.untyped_storage()._cdata] = t.untyped_storage()  # held, so that no later one has its address
        return t

    with torch.device("meta"):
        net = model.two_view(vars(s), torch.empty(prototypes.shape)).train()
        for backbone in net.backbones.values():
            backbone.recompute = s.recompute
        lengths = [(2, s.frames), *([(s.short_crops, s.short_frames)] if s.short_crops else [])]
        clips = [{view: torch.empty(videos, crops, model.CHANNELS[view], frames, s.size, s.size) for view in s.views}
                 for crops, frames in lengths]
        with saved_tensors_hooks(keep, lambda t: t):
            net(clips, frozen)
    for t in (*net.parameters(), *net.buffers()):
        kept.pop(t.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values()) / videos


def free_bytes():
    """Memory that processes can still have on this machine, or in this container; None where it isn't known."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # no Linux
        return None
    try:
        limit, used = (int(Path(CGROUP, f"memory.{name}").read_text()) for name in ("max", "current"))
        of = dict(line.split() for line in Path(CGROUP, "memory.stat").read_text().splitlines())
        cached = int(of["active_file"]) + int(of["inactive_file"])  # given back when it is needed
        return min(free, limit - used + cached)
    except (OSError, KeyError, ValueError):  # none, or "max"
        return free


def step_memory(s, prototypes):
    """-> (what a step on CPUs keeps and what is free, in a line; whether it fits, None where it isn't known)."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    each, free = s.batch_size * activation_bytes(s, prototypes), free_bytes()
    said = f"a step keeps {each / 1e9:.1f} GB of activations{f' in each of {processes} processes' * (processes > 1)}"
    return (said, None) if free is None else (f"{said}, and {free / 1e9:.1f} GB are free", each * processes <= free)


def check_memory(s, prototypes):
    """`step_memory` in a line. Raises BadInput where this machine's processes don't have so much: the system would end
    them without a word."""
    said, fits = step_memory(s, prototypes)
    if fits is False:
        raise BadInput(f"out of memory: {said}, with {against_out_of_memory(s)}")
    return said


def memory_warning(s, prototypes):
    """A warning where a step on CPUs keeps more than is free, else None: there may be swap. Not reckoned, which takes a
    second, for clips of less than a thousandth of what is free: activations are 60 (S3D) to 250 times the clips."""
    pixels = (2 * s.frames + s.short_crops * s.short_frames) * s.size ** 2
    clips = 4 * pixels * sum(model.CHANNELS[view] for view in s.views) * s.batch_size
    if 1000 * clips * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < (free_bytes() or 0):
        return None
    said, fits = step_memory(s, prototypes)
    return None if fits is not False else (f"warning: {said}: the system may end this run without a message (status "
                                           f"137), with {against_out_of_memory(s)}")
