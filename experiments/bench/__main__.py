"""Every claim of speed as a ratio against its baseline, both measured in one run: `python -m experiments.bench`.

In   rows to run (all by default): operator step loader prototypes evaluation flow search
Out  a table, and with --json FILE a list of objects {row, case, device, threads, baseline_ms, ours_ms, ratio, floor_ms}

Ours and the baseline take turns and the medians are compared, so that the load of other jobs meets both. Each row first
checks that both compute the same. floor_ms is what the machine can't go below: the bytes that must move over the
bandwidth it measures, the exponentials or the products over the rate it measures, whichever is longest.

operator    the guided loss, forward and backward, against the released code's way of it (operator.py)
step        one training step of S3D against contiguous float32 with the released code's loss (step.py)
loader      from files to 2 long and 4 short augmented clips of both views (loader.py)
prototypes  Eq. 11 at four sizes against SGD as published (prototypes.py)
evaluation  exact retrieval and k-means (evaluation.py)
flow        TV-L1 against OpenCV's (flow.py)
search      the nearest of a film in an index against FAISS, where that is installed (search.py)
"""

import argparse
import json

from experiments.bench.evaluation import evaluation
from experiments.bench.flow import flow
from experiments.bench.loader import loader
from experiments.bench.measure import add_device, device_of
from experiments.bench.operator import operator
from experiments.bench.prototypes import prototypes
from experiments.bench.search import search
from experiments.bench.step import step
from support.cli import Help, command_line
from support.files import atomic, check_writable

ROWS = {"operator": operator, "step": step, "loader": loader, "prototypes": prototypes, "evaluation": evaluation,
        "flow": flow, "search": search}


def main():
    parser = argparse.ArgumentParser(prog="python -m experiments.bench", description=__doc__.split("\n")[0],
                                     formatter_class=Help)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"from: {' '.join(ROWS)} (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a JSON list")
    parser.add_argument("--videos", metavar="DIR", help="real films for the rows that read some (default: generated)")
    add_device(parser)
    args = parser.parse_args()
    device = device_of(args)
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are: {' '.join(ROWS)}")
    if args.json:
        check_writable(args.json, "--json")
    rows = []
    for name in args.rows or ROWS:
        for result in ROWS[name](device, args.videos):
            rows.append(result)
            if args.json:  # each time: a run that is stopped keeps what it has
                with atomic(args.json) as path:
                    path.write_text(json.dumps(rows, indent=1) + "\n")
            floor = "" if result["floor_ms"] is None else f", floor {result['floor_ms']:.3f} ms"
            print(f"{name}: {result['case']} [{result['device']}, {result['threads']} threads]: baseline "
                  f"{result['baseline_ms']:.3f} ms, ours {result['ours_ms']:.3f} ms, {result['ratio']:.1f}x{floor}",
                  flush=True)


if __name__ == "__main__":
    command_line(main)
