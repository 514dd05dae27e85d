"""Row of the bench: guided loss, forward and backward, float32, against the released code's way of it.

Baseline, written from its description: one Sinkhorn a call in the exp domain, the log-softmax again for each pair of
crops, autograd (released.py). About 40 seconds.
"""

import sys

import torch

import goca
from experiments.bench.measure import in_turns, machine_rates, row
from experiments.bench.released import exp_domain_loss


def operator(device, videos):
    bandwidth, exp_rate = machine_rates(device)
    print(f"{bandwidth / 1e9:.1f} GB/s copied, {exp_rate / 1e9:.2f} G exponentials/s", file=sys.stderr)
    crops, n = 6, 1000
    for m in (10, 64, 640, 4096):
        g = torch.Generator().manual_seed(m)
        features = torch.nn.functional.normalize(torch.randn(2, crops, m, 128, generator=g), dim=-1)
        prototypes = torch.nn.functional.normalize(torch.randn(n, 128, generator=g), dim=-1)
        scores = (features @ prototypes.T).to(device).requires_grad_()

        def step(loss, x=scores):
            x.grad = None
            value = loss(x)
            value.backward()
            return value.detach(), x.grad

        def ours(x=scores):
            return step(lambda y: goca.guided_loss(y, impl="compiled", check_finite=False), x)

        def baseline(x=scores):
            return step(exp_domain_loss, x)

        for a, b in zip(ours(), baseline(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 / m)
        baseline_ms, ours_ms = in_turns([baseline, ours], device)
        entries = m * n * 2 * crops
        floor = max(2 * 4 * entries / bandwidth, (entries + 2 * m * n * 4) / exp_rate)
        yield row("operator", f"guided loss, forward + backward, M={m} N={n}, 2 views, {crops} crops, 2 assigning",
                  device, baseline_ms, ours_ms, 1e3 * floor)
