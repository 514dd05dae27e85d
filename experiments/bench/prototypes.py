"""Prototypes by size: how far apart they end, what no code can pass, and how long the fit takes (Eq. 11).

As a row of bench.py: some sizes against SGD as published, of whose 50,000 steps a few are timed. By itself the table of
docs/results.md, one size a line as it is done (an hour of one core, most of it for 10,000; choose by --num, --dim):

    python -m experiments.bench.prototypes --num 300 1000 3000 10000 --dim 64 128 256 512 --json FILE
"""

import argparse
import json
import sys
import time

import torch
from torch.nn import functional as F

import prototypes as eq11
from experiments.bench.measure import add_device, device_of, row
from support.cli import Help, command_line
from support.files import atomic, check_writable

SGD_STEPS = 50_000
SIZES = [(300, 64), (1000, 128), (1000, 512), (3000, 64)]  # of the row: fitted, the paper's, orthoplex, Kerdock


def published_sgd(num, dim, steps, device):
    """Eq. 11 by SGD on the row maximum, learning rate 0.1, rows kept on the sphere -> mean nearest-neighbour cosine."""
    W = F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(0)), dim=1).to(device)
    for _ in range(steps):
        W.requires_grad_()
        gradient, = torch.autograd.grad(eq11.prototype_loss(W), W)
        W = F.normalize(W.detach() - 0.1 * gradient, dim=1)
    return eq11.nearest_cosine(W)[0]


def measure(num, dim, device):
    """One size -> {num, dim, construction, mean, max, bound, seconds (on a CPU those of its cores, summed up)}."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    W, construction = eq11.construct(num, dim, device=device)
    seconds = clock() - start
    mean, greatest = eq11.nearest_cosine(W)
    return {"num": num, "dim": dim, "construction": construction, "mean": round(mean, 4), "max": round(greatest, 4),
            "bound": round(eq11.levenshtein_bound(num, dim), 4), "seconds": round(seconds, 1)}


def line(m):
    return (f"| {m['num']} | {m['dim']} | {m['construction']} | {m['mean']:.4f} | {m['max']:.4f} | {m['bound']:.4f} | "
            f"{m['seconds']:.1f} |")


def prototypes(device, videos):
    """The row of bench.py; the published SGD ends at 0.0991 for 1000 x 128 (a whole run, 50,000 steps)."""
    for num, dim in SIZES:
        steps = max(5, 200 * 1000 ** 2 * 128 // (num ** 2 * dim) // 4)
        published_sgd(num, dim, 2, device)  # warms up
        start = time.perf_counter()
        published_sgd(num, dim, steps, device)
        between = time.perf_counter()
        m = measure(num, dim, device)
        ours_ms, baseline_ms = 1e3 * (time.perf_counter() - between), 1e3 * (between - start) * SGD_STEPS / steps
        print(line(m), file=sys.stderr, flush=True)
        if (num, dim) == (1000, 128):
            assert m["mean"] < 0.0991, m
        yield row("prototypes", f"{num} x {dim} ({m['construction']}): nearest-neighbour cosine mean {m['mean']:.4f}, "
                  f"max {m['max']:.4f}, bound {m['bound']:.4f}; SGD's 50,000 steps", device, baseline_ms, ours_ms)


def main():
    p = argparse.ArgumentParser(prog="python -m experiments.bench.prototypes", description=__doc__.split("\n")[0],
                                formatter_class=Help)
    p.add_argument("--num", type=int, nargs="+", default=[300, 1000, 3000, 10_000], help="how many")
    p.add_argument("--dim", type=int, nargs="+", default=[64, 128, 256, 512], help="of which dimensions")
    add_device(p)
    p.add_argument("--json", metavar="FILE", help="write the rows as a JSON list, again after each")
    args = p.parse_args()
    device = device_of(args)
    if args.json:
        check_writable(args.json, "--json")
    print(f"| N | d | made by | mean | max | bound | core-seconds ({device}) |\n"
          f"|---|---|---|---|---|---|---|")
    rows = []
    for num, dim in sorted(((n, d) for n in args.num for d in args.dim), key=lambda s: s[0] ** 2 * s[1]):
        rows.append(measure(num, dim, device))
        print(line(rows[-1]), flush=True)
        if args.json:
            with atomic(args.json) as path:
                path.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    command_line(main)
