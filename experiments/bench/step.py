"""Row of the bench about a whole training step: clips on the device to changed weights, both views of S3D.

Ours: as pretrain.py trains: `step_loss`, channels last in memory, on a GPU bfloat16 with assignment and loss in
float32, on a CPU freed memory kept. Baseline: the same network on the same clips, contiguous float32, with the released
code's loss, memory as the C library has it; that is a process's setting, so each is one, and they take turns. CPU: 4
videos of 2 crops of 16 frames of 64 px; GPU: 10 videos of 2 crops of 32 and 4 of 16 frames of 128 px, the paper's.
About a minute on 2 cores. The loss is checked to be the same first. The floor is the step's multiplications and
additions over the rate of a matrix product in the same precision, measured in the same run: no way of computing the
same sums is much faster.
"""

import multiprocessing
import sys
from contextlib import contextmanager, suppress

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model
import pretrain
from experiments.bench.measure import in_turns, row
from experiments.bench.released import exp_domain_loss
from support.loader import keep_freed_memory
from support.training_log import peak_gib


def settings(more=()):
    return pretrain.arguments(["--videos", "-", "--flow", "-", "--prototypes", "-", "--out", "-", *more])


def network(s, device, memory_format):
    """The paper's S3D, the same weights each time, and its optimizer."""
    prototypes = F.normalize(torch.randn(1000, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    net = model.two_view(vars(s), prototypes).to(device, memory_format=memory_format)
    return net.train(), pretrain.make_optimizer(net, s)


def random_clips(device, memory_format, videos, lengths, size):
    """Noise in place of films: [{"rgb": [m, v, 3, T, S, S], "flow": [m, v, 2, T, S, S]}, ...]."""
    g = torch.Generator().manual_seed(0)
    out = []
    for crops, frames in lengths:
        clip = {}
        for view, channels in model.CHANNELS.items():
            x = torch.randn(videos * crops, channels, frames, size, size, generator=g)
            clip[view] = x.to(device, memory_format=memory_format).unflatten(0, (videos, crops))
        out.append(clip)
    return out


def trainer(pipe, ours, device, case, threads, flags):
    """A process: sends what its first two steps give, then does a step for each message, which it answers."""
    torch.set_num_threads(threads)
    if ours and device.type == "cpu":
        keep_freed_memory()
    s, form = settings(flags), torch.channels_last_3d if ours else torch.contiguous_format
    net, optimizer = network(s, device, form)
    clips = random_clips(device, form, *case)

    def step():
        if ours:
            with model.precision(device):
                loss, *_ = pretrain.step_loss(net, clips, s, (True, True))
        else:
            loss = exp_domain_loss(net.scores(net(clips)), s.lambda1, s.lambda2)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()  # waits for a GPU

    with FlopCounterMode(display=False) as counter:
        loss = step()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step()
    pipe.send((loss, counter.get_total_flops(), peak_gib()))
    with suppress(EOFError):  # the bench is over
        while True:
            pipe.recv()
            step()
            pipe.send(None)


@contextmanager
def trainers(device, case, flags=()):
    """The baseline's and our process -> their pipes; they end with them. flags: of pretrain.py, beside the paper's."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for ours in (False, True):
        pipe, theirs = context.Pipe()
        args = theirs, ours, device, case, torch.get_num_threads(), flags
        processes.append(context.Process(target=trainer, args=args, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(pipe)
    yield pipes
    for pipe in pipes:
        pipe.close()
    for process in processes:
        process.join()


def step(device, videos):
    case = (4, [(2, 16)], 64) if device.type == "cpu" else (10, [(2, 32), (4, 16)], 128)
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)

    def ask(pipe):
        pipe.send(None)
        pipe.recv()

    with trainers(device, case) as pipes:
        (plain_loss, _, plain_peak), (loss, flops, peak) = [pipe.recv() for pipe in pipes]
        assert abs(loss / plain_loss - 1) < (0.05 if device.type == "cuda" else 1e-3), (loss, plain_loss)
        baseline_ms, ours_ms, product_ms = in_turns([lambda: ask(pipes[0]), lambda: ask(pipes[1]), lambda: a @ a],
                                                    device, seconds=20, least=3)
    floor_ms = flops / (2 * n**3) * product_ms
    print(f"peak memory: baseline {plain_peak:.1f} GiB, ours {peak:.1f} GiB; {flops / 1e9:.0f} GFLOP a step, "
          f"{2 * n**3 / product_ms / 1e6:.0f} GFLOP/s in a matrix product of {n}", file=sys.stderr)
    crops = " + ".join(f"{v} x {t}" for v, t in case[1])
    yield row("step", f"S3D, {case[0]} videos, {crops} frames of {case[2]} px, both views, LARS", device, baseline_ms,
              ours_ms, floor_ms)
