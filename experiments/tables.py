"""Tables from the results that evaluate.py wrote.

    python -m experiments.tables show untrained.json goca.json [sep.json ...]

One row a file and view, in the order given: R@1 and R@5 with standard errors, chance in the last row. Files must hold
the same queries and the same protocol; what differs is said.
"""

import argparse
import json
from pathlib import Path

import data

SAME = ("protocol", "fusion", "dataset", "split", "gallery", "queries", "classes")  # rows are comparable only then


def load(path):
    """A retrieval result. Raises BadInput if it is none."""
    try:
        out = json.loads(Path(path).read_text())
        out["protocol"]["method"], out["results"]
        return out
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise data.BadInput(f"{path} is no result of: python evaluate.py retrieval --json ({e})") from e


def show(args):
    """Print the table; ks that the smallest gallery does not allow are left out."""
    results = {path: load(path) for path in args.files}
    first = next(iter(results.values()))["protocol"]
    for path, r in results.items():
        differ = [f"{k} {r['protocol'][k]} and {first[k]}" for k in SAME if r["protocol"][k] != first[k]]
        if differ:
            raise data.BadInput(f"{path} and {args.files[0]} can't stand in one table: {', '.join(differ)}")
    ks = [k for k in args.k if all(f"R@{k}" in v for r in results.values() for v in r["results"].values())]
    print(f"{first['dataset']}, split {first['split']}, protocol {first['protocol']}: {first['queries']} queries, "
          f"{first['gallery']} gallery videos, {first['classes']} classes; ± is the standard error")
    print(f"{'network':<14}{'view':<10}" + "".join(f"{f'R@{k}':>14}" for k in ks))
    for r in results.values():
        for view, v in r["results"].items():
            print(f"{r['protocol']['method']:<14}{view:<10}"
                  + "".join(f"{v[f'R@{k}']:8.1f} ± {v[f'R@{k} standard error']:<3.1f}" for k in ks))
    print(f"{'chance':<24}" + "".join(f"{v[f'R@{k} chance']:8.1f}      " for k in ks))
    return 0


def main():
    p = argparse.ArgumentParser(description="Tables from the results that evaluate.py wrote.")
    c = p.add_subparsers(dest="command", required=True).add_parser("show", help="R@k of several networks")
    c.add_argument("files", nargs="+", help="results of: python evaluate.py retrieval --json FILE")
    c.add_argument("--k", type=int, nargs="+", default=[1, 5])
    return show(p.parse_args())


if __name__ == "__main__":
    data.command_line(main)
