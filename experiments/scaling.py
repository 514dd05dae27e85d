"""What several processes cost a step: messages and bytes, time in them here, and a model of many GPUs on paper.

    python -m experiments.scaling [--processes 1 2 4] [--json FILE]

Out  a table, and with --json FILE {"messages": [...], "here": [...], "model": [...]}.

Recorded: the collectives of one real step of the full S3D (2 x 32 + 4 x 16 frames a video; bytes do not depend on the
size of the clips, so theirs is the smallest). Measured here: the same messages, one after the other and with nothing
between them, over gloo in 1, 2, 4 processes on this machine, the median of several times. About a minute on 2 cores.

The model (a model: nothing of it has been measured). G GPUs a node, W in all, W/G nodes. Microseconds and bytes:
    all-gather of n bytes a GPU    base + (W - W/G) intra + (W/G - 1) inter + (W - 1) n / beta             (ring)
    all-reduce of n bytes          the smaller of
        base + 2 (W - W/G) intra + 2 (W/G - 1) inter + 2 (W - 1)/W n / beta                                (ring)
        base + 2 (G - 1) intra + 2 log2(W/G) inter + 2 n / beta                                            (tree)
Latencies are those by which NCCL chooses (its source, src/graph/tuning.cc, low-latency protocol: base 3.6 ring and 4.4
tree; intra .47 and .52 over NVLink, 1.8 times that with several nodes; inter 2.7 and 5). beta is 450 GB/s each way in a
node (NVIDIA H100 data sheet: NVLink 4, 900 GB/s both ways), else that of the node's 8 adapters of 400 Gb/s (NDR
InfiniBand, one a GPU as in DGX H100): 400 GB/s. Launching, waiting for the slowest and the overlap of gradients with
the backward pass, which hides most of them, are left out.
"""

import argparse
import json
import math
import os
import socket
import statistics
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import pretrain
from experiments.bench.step import network, random_clips, settings
from support.batch_norm import synchronise_batch_norm
from support.cli import Help, command_line
from support.distributed import data_parallel
from support.files import atomic, check_writable

GPUS_A_NODE, NVLINK, ADAPTER = 8, 450e9, 50e9  # bytes a second
BASE, INTRA, INTER = {"ring": 3.6, "tree": 4.4}, {"ring": 0.47, "tree": 0.52}, {"ring": 2.7, "tree": 5.0}  # us


# ---------------------------------------------------------------------------------------------------------------------
# Messages of a step
# ---------------------------------------------------------------------------------------------------------------------
def join(rank, world, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def record(videos=10):
    """The collectives of one step -> [(what, kind, bytes that a process puts in)], in their order."""
    join(0, 1, free_port())
    messages, real = [], (dist.all_gather, dist.all_reduce)

    def noting(kind, collective):
        def call(*args, **kwargs):
            x = args[-1] if kind == "all-gather" else args[0]
            what = "features" if x.ndim == 4 else "batch norm"
            messages.append((what, kind, x.numel() * x.element_size()))
            return collective(*args, **kwargs)
        return call

    def bucket_hook(group, bucket):
        x = bucket.buffer()
        messages.append(("gradients", "all-reduce", x.numel() * x.element_size()))
        done = torch.futures.Future()
        done.set_result(x)
        return done

    dist.all_gather, dist.all_reduce = noting("all-gather", real[0]), noting("all-reduce", real[1])
    try:
        device, s = torch.device("cpu"), settings()
        net, _ = network(s, device, torch.channels_last_3d)
        net = synchronise_batch_norm(net)
        net = data_parallel(net, device)
        net.register_comm_hook(dist.group.WORLD, bucket_hook)
        clips = random_clips(device, torch.channels_last_3d, videos, [(2, 8), (4, 8)], 32)
        messages.clear()  # those of DDP's construction
        pretrain.step_loss(net, clips, s, (True, True))[0].backward()
    finally:
        dist.all_gather, dist.all_reduce = real
        dist.destroy_process_group()
    return messages


# ---------------------------------------------------------------------------------------------------------------------
# Here
# ---------------------------------------------------------------------------------------------------------------------
def replay(rank, world, port, messages, times, out):
    """Send the messages `times` times; rank 0 writes the milliseconds of each kind, one list a time."""
    torch.set_num_threads(1)
    join(rank, world, port)
    every = []
    for _ in range(times + 1):
        spent = {}
        for what, kind, n in messages:
            x = torch.zeros(n // 4)
            parts = [torch.empty_like(x) for _ in range(world)] if kind == "all-gather" else None
            began = time.perf_counter()
            dist.all_gather(parts, x) if parts else dist.all_reduce(x)
            spent[what] = spent.get(what, 0) + 1e3 * (time.perf_counter() - began)
        every.append(spent)
    if rank == 0:
        out.put(every[1:])  # the first one connects
    dist.destroy_process_group()


def here(worlds, messages, times=5):
    """-> [{"processes", and milliseconds a step by what is sent}]"""
    rows = []
    for world in worlds:
        out = mp.get_context("spawn").SimpleQueue()
        context = mp.spawn(replay, (world, free_port(), messages, times, out), world, join=False)
        every = out.get()
        while not context.join():
            pass
        rows.append({"processes": world, **{k: round(statistics.median(e[k] for e in every), 2) for k in every[0]}})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# On paper
# ---------------------------------------------------------------------------------------------------------------------
def modelled(kind, n, gpus, a_node=GPUS_A_NODE):
    """Seconds of one message on `gpus` GPUS, by the formulas above."""
    nodes = max(1, gpus // a_node)
    local = gpus // nodes
    beta = NVLINK if nodes == 1 else a_node * ADAPTER
    intra = {k: v * (1 if nodes == 1 else 1.8) for k, v in INTRA.items()}
    steps = 1e-6 * ((gpus - nodes) * intra["ring"] + (nodes - 1) * INTER["ring"])
    if kind == "all-gather":
        return 1e-6 * BASE["ring"] + steps + (gpus - 1) * n / beta
    ring = 1e-6 * BASE["ring"] + 2 * steps + 2 * (gpus - 1) / gpus * n / beta
    tree = 1e-6 * (BASE["tree"] + 2 * (local - 1) * intra["tree"] + 2 * math.log2(nodes) * INTER["tree"]) + 2 * n / beta
    return min(ring, tree)


def model(messages, worlds=(8, 64, 512)):
    rows = []
    for gpus in worlds:
        spent = {}
        for what, kind, n in messages:
            spent[what] = spent.get(what, 0) + 1e3 * modelled(kind, n, gpus)
        rows.append({"gpus": gpus, **{k: round(v, 2) for k, v in spent.items()}})
    return rows


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.scaling", description=__doc__.split("\n")[0],
                                     formatter_class=Help)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help="to measure here")
    parser.add_argument("--json", metavar="FILE", help="write messages and both tables")
    args = parser.parse_args()
    if args.json:
        check_writable(args.json, "--json")
    messages = record()
    kinds = {}
    for what, kind, n in messages:
        count, total = kinds.get((what, kind), (0, 0))
        kinds[what, kind] = count + 1, total + n
    for (what, kind), (count, total) in kinds.items():
        print(f"{what}: {count} x {kind}, {total / 1e6:.3f} MB that each process puts in a step")
    measured, paper = here(args.processes, messages), model(messages)
    for row in measured:
        print("here, gloo:", ", ".join(f"{k} {v}" + (" ms" if k != "processes" else "") for k, v in row.items()))
    for row in paper:
        print("on paper:", ", ".join(f"{k} {v}" + (" ms" if k != "gpus" else "") for k, v in row.items()))
    if args.json:
        with atomic(args.json) as path:
            path.write_text(json.dumps({"messages": messages, "here": measured, "model": paper}, indent=1) + "\n")


if __name__ == "__main__":
    command_line(main)
