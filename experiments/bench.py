"""Every claim of speed as a ratio against its baseline, both measured in one run: `python -m experiments.bench`.

In   rows to run (all by default): operator step loader prototypes evaluation flow
Out  a table, and with --json FILE a list of objects {row, case, device, threads, baseline_ms, ours_ms, ratio, floor_ms}

Ours and the baseline take turns and the medians are compared, so that a neighbour's load meets both. Each row first
checks that both compute the same. floor_ms is what the machine can't go below: the bytes that must move over the
bandwidth it measures, the exponentials or the products over the rate it measures, whichever is longest.

operator  guided loss, forward and backward, float32. Baseline: the way of the released code, written from its
          description: one Sinkhorn a call in the exp domain, the log-softmax again for each pair of crops, autograd.
          About 40 seconds.
step      one training step of S3D against contiguous float32 with the released code's loss (experiments/bench_step.py).
loader    from files to 2 long and 4 short augmented clips of both views (experiments/bench_data.py).
prototypes  Eq. 11 for 1000 x 128 against SGD as published (experiments/bench_prototypes.py).
evaluation  exact retrieval and k-means (experiments/bench_evaluation.py).
flow      TV-L1 against OpenCV's (experiments/bench_flow.py).
"""

import argparse
import json
import sys

import torch

import goca
from data import BadInput, atomic, check_writable, command_line
from experiments.bench_data import loader
from experiments.bench_evaluation import evaluation
from experiments.bench_flow import flow
from experiments.bench_prototypes import prototypes
from experiments.bench_step import step
from experiments.measure import in_turns, machine_rates, row
from experiments.released import exp_domain_loss


# ---------------------------------------------------------------------------------------------------------------------
# operator
# ---------------------------------------------------------------------------------------------------------------------
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


ROWS = {"operator": operator, "step": step, "loader": loader, "prototypes": prototypes, "evaluation": evaluation,
        "flow": flow}


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"from: {' '.join(ROWS)} (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a JSON list")
    parser.add_argument("--videos", metavar="DIR", help="real films for the rows that read some (default: generated)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu",
                        help="(default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are: {' '.join(ROWS)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no NVIDIA GPU here")
    if args.json:
        check_writable(args.json, "--json")
    rows = []
    for name in args.rows or ROWS:
        for result in ROWS[name](torch.device(args.device), args.videos):
            rows.append(result)
            floor = "" if result["floor_ms"] is None else f", floor {result['floor_ms']:.3f} ms"
            print(f"{name}: {result['case']} [{result['device']}, {result['threads']} threads]: baseline "
                  f"{result['baseline_ms']:.3f} ms, ours {result['ours_ms']:.3f} ms, {result['ratio']:.1f}x{floor}",
                  flush=True)
    if args.json:
        with atomic(args.json) as path:
            path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    command_line(main)
