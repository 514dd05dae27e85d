"""Row of bench.py about a whole training step: clips on the device to changed weights, both views of S3D.

Ours: `pretrain.step_loss`, channels last in memory, on a GPU bfloat16 with assignment and loss in float32. Baseline:
the same network on the same clips, contiguous float32, with the released code's loss. CPU: 4 videos of 2 crops of 16
frames of 64 px; GPU: 10 videos of 2 crops of 32 and 4 of 16 frames of 128 px, the paper's. About a minute on 2 cores.
The loss is checked to be the same first. The floor is the step's multiplications and additions over the rate of a
matrix product in the same precision, measured in the same run: no way of computing the same sums is much faster.
"""

import sys

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model
import pretrain
from experiments.measure import in_turns, row
from experiments.released import exp_domain_loss


def settings():
    return pretrain.arguments(["--videos", "-", "--flow", "-", "--prototypes", "-", "--out", "-"])


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


def step(device, videos):
    case = (4, [(2, 16)], 64) if device.type == "cpu" else (10, [(2, 32), (4, 16)], 128)
    s = settings()
    plain, plain_optimizer = network(s, device, torch.contiguous_format)
    fast, fast_optimizer = network(s, device, torch.channels_last_3d)
    plain_clips, fast_clips = (random_clips(device, form, *case) for form in (torch.contiguous_format,
                                                                              torch.channels_last_3d))

    def baseline():
        loss = exp_domain_loss(plain.scores(plain(plain_clips)), s.lambda1, s.lambda2)
        loss.backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def ours():
        with pretrain.precision(device):
            loss, *_ = pretrain.step_loss(fast, fast_clips, s, True)
        loss.backward()
        fast_optimizer.step()
        fast_optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    torch.testing.assert_close(ours(), baseline(), rtol=0.05 if device.type == "cuda" else 1e-3, atol=0)
    peak = {}
    if device.type == "cuda":
        for name, call in (("baseline", baseline), ("ours", ours)):
            torch.cuda.reset_peak_memory_stats(device)
            call()
            peak[name] = torch.cuda.max_memory_allocated(device) / 2**30
        print(f"peak memory: baseline {peak['baseline']:.1f} GiB, ours {peak['ours']:.1f} GiB", file=sys.stderr)
    with FlopCounterMode(display=False) as counter:
        ours()
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1536, torch.float32)
    a = torch.randn(n, n, device=device, dtype=dtype)
    baseline_ms, ours_ms, product_ms = in_turns([baseline, ours, lambda: a @ a], device, seconds=20, least=3)
    floor_ms = counter.get_total_flops() / (2 * n**3) * product_ms
    print(f"{counter.get_total_flops() / 1e9:.0f} GFLOP a step, {2 * n**3 / product_ms / 1e6:.0f} GFLOP/s in a matrix "
          f"product of {n}", file=sys.stderr)
    crops = " + ".join(f"{v} x {t}" for v, t in case[1])
    yield row("step", f"S3D, {case[0]} videos, {crops} frames of {case[2]} px, both views, LARS", device, baseline_ms,
              ours_ms, floor_ms)
