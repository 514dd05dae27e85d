"""The tables of the paper: the runs that they need, and our numbers beside the paper's.

    python -m experiments.tables run  --table 1 --results DIR --sets sets.json --pretrain ucf101 --on ucf101 hmdb51 \\
        --seeds 0 1 2
    python -m experiments.tables show --table 1 --results DIR [--on ucf101 hmdb51] [--format latex]
    python -m experiments.tables show untrained.json goca.json [sep.json ...]

run: pre-trains what the table needs, seed by seed, and evaluates it: DIR/<run>/seed<k>/ holds checkpoint, log and
<command>-<set>.json; DIR/commands.jsonl each command with its seconds. Interrupted, the same command goes on; what is
done is not done again. sets.json names the data sets: {"ucf101": {"dataset": "ucf101", "videos": ..., "splits": ...,
"flow": ...}, ...}, any names and sizes. --pretrain-flags and --evaluate-flags go to pretrain.py and evaluate.py.

show: the table as Markdown or LaTeX; a cell without a run says so. With files: R@k of several retrieval results, whose
queries and protocol must be the same, as plain text.
"""

import argparse
import json
import math
import os
import re
import shlex
import signal
import statistics
from collections import Counter
from pathlib import Path

import numpy as np

import model
from experiments.driver import Driver, read_commands
from experiments.paper import LAMBDAS, TABLES, lambda_run
from support.cli import Subcommand, command_line, positive_int, random_seed
from support.errors import BadInput
from support.files import atomic, check_folder, check_writable, save_arrays

# what numbers depend on beside the network and chance: rows are comparable only where these are the same
SAME = ("command", "protocol", "fusion", "dataset", "split", "gallery", "queries", "classes", "videos", "clusters",
        "runs", "train", "test", "on", "recipe", "optimizer", "lr", "weight_decay", "epochs", "milestones", "l2",
        "batch_norm", "dropout", "backbone", "batch")


# ---------------------------------------------------------------------------------------------------------------------
# run: the commands of a table
# ---------------------------------------------------------------------------------------------------------------------
def run_flags(run):
    """The flags of pretrain.py that make a run what its name says -> (defaults, fixed), before and after the user's."""
    grid = {lambda_run(a, b): ["--lambda1", str(a), "--lambda2", str(b)] for a in LAMBDAS for b in LAMBDAS}
    if run in grid:  # 200 epochs: section 4.1
        return ["--epochs", "200"], ["--method", "goca", *grid[run]]
    if run == "sview-trained-prototypes":  # a row of RGB; trained prototypes are of one network
        return [], ["--method", "sview", "--views", "rgb", "--train-prototypes"]
    special = {"prior-sign-minus": ["--prior-sign", "-1"], "r2plus1d18": ["--arch", "r2plus1d18"],
               "trained-prototypes": ["--train-prototypes"]}
    method, _, variant = run.partition("-")
    return (["--size", "112"] if variant == "r2plus1d18" else []), ["--method", method, *special.get(variant, [])]


def evaluate_flags(run, command):
    """The flags of evaluate.py that a run's name and a command ask for: section 4 has 16 frames where R(2+1)D is probed
    and fine-tuned, and the 32 of pre-training else."""
    return ["--frames", "16"] if "r2plus1d18" in run and command in ("linear", "finetune") else []


def read_sets(path):
    """sets.json -> {name: flags}. Raises BadInput where it is not as described above."""
    try:
        out = {}
        for name, s in json.loads(Path(path).read_text("utf-8-sig")).items():
            out[name] = ["--dataset", s["dataset"], "--videos", str(Path(s["videos"]).absolute()), "--flow",
                         str(Path(s["flow"]).absolute())]
            if "splits" in s:
                out[name] += ["--splits", str(Path(s["splits"]).absolute())]
        return out
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadInput(f"--sets {path} is no JSON file of {{name: {{dataset, videos, splits, flow}}}} "
                       f"({e!r})") from e


def random_prototypes(path, num, dim):
    """The unregularised prototypes of Table 3, trained or not: unit rows drawn at random, not fitted by Eq. 11."""
    p = np.random.default_rng(0).standard_normal((num, dim), dtype=np.float32)
    save_arrays(path, "prototypes", {"num": num, "dim": dim, "seed": 0, "fitted": False},
                prototypes=p / np.linalg.norm(p, axis=1, keepdims=True))


def run(args):
    """Pre-train and evaluate all that the tables need -> 0, or 1 where a command failed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sets, results = read_sets(args.sets), Path(os.path.abspath(args.results))
    for name in {args.pretrain, *args.on} - set(sets):
        raise BadInput(f"--sets {args.sets} names no data set {name}; it has {', '.join(sets)}")
    check_folder(results, "--results")
    driver, user = Driver(results), shlex.split(args.pretrain_flags)
    fitted, random = results / "prototypes.npz", results / "random_prototypes.npz"
    size = ["--num", str(args.num), "--dim", str(args.dim)]
    if not driver(["prototypes.py", *size, "--out", str(fitted)], fitted, results / "prototypes.log"):
        return 1
    if not random.exists():
        random_prototypes(random, args.num, args.dim)
    wanted = {}  # run -> commands of evaluate.py, in the tables' order
    for table in (TABLES[n] for n in args.table):
        for name in (r.run for r in table.rows if r.run):
            wanted.setdefault(name, set()).add(table.command)
    for name in [n for n in wanted if n.split("-")[0] not in model.METHODS and not n.startswith("lambda")]:
        print(f"{name}: pretrain.py has no --method {name}; its rows stay as not run")
        del wanted[name]
    for seed in args.seeds:
        for name, commands in wanted.items():
            source = "k400" if name.endswith("k400") else args.pretrain
            if source not in sets:
                print(f"{name}: --sets names no data set {source}; its rows stay as not run")
                continue
            folder, (defaults, fixed) = results / name / f"seed{seed}", run_flags(name)
            prototypes = random if name.endswith("-prototypes") else fitted
            trained = driver(["pretrain.py", *sets[source], "--prototypes", str(prototypes), "--out", str(folder),
                              *defaults, *user, *fixed, "--seed", str(seed)], folder / "checkpoint.pt",
                             folder / "pretrain.log", args.processes)
            for command in sorted(commands) if trained else ():
                for on in args.on:
                    out = folder / f"{command}-{on}.json"
                    keep = ["--out", str(folder / f"{command}-{on}")] if command == "finetune" else []
                    driver(["evaluate.py", command, "--checkpoint", str(folder), *sets[on], "--json", str(out), *keep,
                            *evaluate_flags(name, command), *shlex.split(args.evaluate_flags)], out,
                           folder / f"{command}-{on}.log", args.processes)
    for log in driver.failed:
        print(f"failed: {log}")
    return 1 if driver.failed else 0


# ---------------------------------------------------------------------------------------------------------------------
# show: the paper's numbers, ours, and what lies between
# ---------------------------------------------------------------------------------------------------------------------
def load(path, command="retrieval"):
    """A result of evaluate.py. Raises BadInput if it is none."""
    try:
        out = json.loads(Path(path).read_text())
        out["protocol"]["method"], [numbers.keys() for numbers in out["results"].values()]
        return out
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise BadInput(f"{path} is no result of: python evaluate.py {command} --json ({e!r})") from e


def collect(table, results, data_set):
    """The results of a table's runs on a data set, [{seed: JSON object}], one a row: those with its view. Raises
    BadInput where two can't be compared."""
    found, first = {"": {}}, None
    for run in {row.run for row in table.rows} - {""}:
        found[run] = {}
        for folder in sorted(Path(results).glob(f"{run}/seed*")):
            path = folder / f"{table.command}-{data_set}.json"
            if re.fullmatch(r"seed\d+", folder.name) and path.exists():
                r = load(path, table.command)
                first = first or (path, r["protocol"])
                check_comparable(path, r["protocol"], *first)
                found[run][int(folder.name.removeprefix("seed"))] = r
    return [{seed: r for seed, r in found[row.run].items() if row.view in r["results"]} for row in table.rows]


def ours(found, view, metric):
    """Mean over seeds and its error: of the test set (or of k-means' runs) and, from two seeds on, between seeds.

    (nan, 0) for a metric that a result lacks, as R@20 of 10 videos.
    """
    rows = [r["results"][view] for r in found.values()]
    values = [r.get(metric, math.nan) for r in rows]
    if any(map(math.isnan, values)):
        return math.nan, 0
    error = statistics.mean(r.get(f"{metric} standard error", r.get(f"{metric} deviation", 0)) for r in rows)
    between = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0
    return statistics.mean(values), math.hypot(error, between)


HEAD = ("method", "data set", "paper", "ours", "difference in standard errors", "seeds", "hours", "logs")


def cells(table, results, data_sets):
    """The lines of a table, each a tuple like HEAD. Several metrics of a cell stand between slashes."""
    spent = Counter()
    for c in read_commands(results):
        spent[Path(c["out"]).parts[-3:]] += c["seconds"]  # below `results`, wherever that is now; interrupted ones too
    of_row = [data_sets or row.values or ["ucf101"] for row in table.rows]
    every = {name: collect(table, results, name) for names in of_row for name in names}
    lines = []
    for k, row in enumerate(table.rows):
        for name in of_row[k]:
            paper, found = row.values.get(name), every[name][k]
            line = [row.label, name, " / ".join(map(str, paper)) if paper else "–"]
            if not found:
                lines.append((*line, "not run" if row.run else "not ours", "–", "–", "–", "–"))
                continue
            each = [ours(found, row.view, m) for m in table.metrics]
            away = [f"{(x - p) / e:+.1f}" if e else "–" for (x, e), p in zip(each, paper or (), strict=bool(paper))]
            seconds = [spent[row.run, f"seed{seed}", f] for seed in found
                       for f in ("checkpoint.pt", f"{table.command}-{name}.json")]
            shown = " / ".join("–" if math.isnan(x) else f"{x:.1f} ± {e:.1f}" for x, e in each)
            lines.append((*line, shown, " / ".join(away) or "–",
                          ", ".join(map(str, found)), f"{sum(seconds) / 3600:.2f}",
                          f"{row.run}/seed{{{','.join(map(str, found))}}}"))
    return lines


def lambda_grid(lines):
    """The lines of Table 2 as the paper prints them -> (head, lines): rows lambda2, columns lambda1, paper -> ours."""
    grid = [f"{line[2]} → {line[3]}" for line in lines]
    n = len(LAMBDAS)
    return (("lambda2, lambda1:", *map(str, LAMBDAS)),
            [(str(l2), *grid[i * n:(i + 1) * n]) for i, l2 in enumerate(LAMBDAS)])


def as_markdown(title, head, lines):
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(x)} |" for x in (head, ["---"] * len(head), *lines))])


LATEX = {"\\": "/", "&": r"\&", "#": r"\#", "$": r"\$", "_": r"\_", "{": r"\{", "}": r"\}", "%": r"\%", "±": r"$\pm$",
         "–": "--", "→": r"$\to$"}


def escape(text):
    """Text as LaTeX shows it."""
    return re.sub("|".join(map(re.escape, LATEX)) + r"|lambda[12](?!-)", lambda m: LATEX.get(
        m[0], rf"$\lambda_{m[0][-1]}$"), text)  # lambda1 the symbol, not lambda1-0.02 the folder


def as_latex(title, head, lines):
    body = [" & ".join(map(escape, line)) + r" \\" for line in (head, *lines)]
    return "\n".join([r"\begin{table}", rf"\caption{{{escape(title)}}}",
                      rf"\begin{{tabular}}{{l{'c' * (len(head) - 1)}}}", r"\hline", body[0],
                      r"\hline", *body[1:], r"\hline", r"\end{tabular}", r"\end{table}"])


def show_tables(args):
    """Print tables, or write them to --out."""
    if args.out:
        check_writable(args.out, "--out")
    form = as_markdown if args.format == "markdown" else as_latex
    note = ("ours: mean over the seeds ± the error of the test set (clusters: the deviation of the runs of k-means) "
            "and, from two seeds on, of the mean of the seeds; hours: pre-training and this evaluation, all seeds.")
    parts = []
    for table in (TABLES[n] for n in args.table):
        lines = cells(table, args.results, args.on)
        if table is TABLES[2] and len(lines) == len(LAMBDAS)**2:
            parts.append(form(table.title, *lambda_grid(lines)))
        parts.append(form(f"{table.title} ({' / '.join(table.metrics)})", HEAD, lines))
    text = "\n\n".join([*parts, note if args.format == "markdown" else escape(note)]) + "\n"
    if args.out:
        with atomic(args.out) as tmp:
            tmp.write_text(text)
        print(f"written: {args.out}")
    else:
        print(text, end="")
    return 0


def check_comparable(path, protocol, first_path, first):
    """Raise BadInput where two results differ in what their numbers depend on beside the network."""
    ours, theirs = ({"command": "retrieval", **p} for p in (protocol, first))
    differ = [f"{k} {ours.get(k)} and {theirs.get(k)}" for k in SAME if ours.get(k) != theirs.get(k)]
    if differ:
        raise BadInput(f"{path} and {first_path} can't be compared: {', '.join(differ)}")


def show_files(args):
    """Print R@k of several results; ks that not all hold, as the smallest gallery does not allow them, are named."""
    results = {path: load(path) for path in args.files}
    first = next(iter(results.values()))["protocol"]
    for path, r in results.items():
        if "gallery" not in r["protocol"]:
            raise BadInput(f"{path} is no result of: python evaluate.py retrieval --json")
        check_comparable(path, r["protocol"], args.files[0], first)
    every = [v for r in results.values() for v in r["results"].values()]
    ks = [k for k in args.k if all(f"R@{k}" in v for v in every)]
    if not ks:
        held = [k for k in every[0] if re.fullmatch(r"R@\d+", k)]
        raise BadInput(f"--k {' '.join(map(str, args.k))}: {args.files[0]} holds {', '.join(held)}; give one of these")
    print(f"{first['dataset']}, split {first['split']}, protocol {first['protocol']}: {first['queries']} queries, "
          f"{first['gallery']} gallery videos, {first['classes']} classes; ± is the standard error")
    print(f"{'network':<14}{'view':<10}" + "".join(f"{f'R@{k}':>14}" for k in ks))
    for r in results.values():
        for view, v in r["results"].items():
            print(f"{r['protocol']['method']:<14}{view:<10}"
                  + "".join(f"{v[f'R@{k}']:8.1f} ± {v[f'R@{k} standard error']:<3.1f}" for k in ks))
    print(f"{'chance':<24}" + "".join(f"{v[f'R@{k} chance']:8.1f}      " for k in ks))
    if left := [f"R@{k}" for k in args.k if k not in ks]:
        print(f"left out, as not all files hold it: {', '.join(left)}")
    return 0


def show(args):
    if bool(args.files) == bool(args.table):
        raise BadInput("show takes either result files, or --table and --results")
    if args.table and not args.results:
        raise BadInput("--results is missing: the folder that `tables run` filled")
    return show_tables(args) if args.table else show_files(args)


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m experiments.tables",
                                description="The tables of the paper, theirs beside ours.")
    commands = p.add_subparsers(dest="command", required=True, parser_class=Subcommand)
    c = commands.add_parser("run", help="pre-train and evaluate what tables need")
    c.add_argument("--table", type=int, nargs="+", choices=TABLES, required=True)
    c.add_argument("--results", required=True, help="folder to fill")
    c.add_argument("--sets", required=True, help="JSON file of the data sets")
    c.add_argument("--pretrain", default="ucf101", help="name of the set to pre-train on")
    c.add_argument("--on", nargs="+", default=["ucf101"], help="names of the sets to evaluate on")
    c.add_argument("--seeds", type=random_seed, nargs="+", default=[0])
    c.add_argument("--num", type=positive_int, default=1000, help="prototypes")
    c.add_argument("--dim", type=positive_int, default=128, help="of a prototype")
    c.add_argument("--processes", type=positive_int, default=1, help="of torchrun")
    c.add_argument("--pretrain-flags", default="", help="for pretrain.py, in one string")
    c.add_argument("--evaluate-flags", default="", help="for evaluate.py, in one string")
    c.set_defaults(call=run)
    c = commands.add_parser("show", help="tables of the paper, or R@k of several result files")
    c.add_argument("files", nargs="*", help="results of: python evaluate.py retrieval --json FILE")
    c.add_argument("--k", type=positive_int, nargs="+", default=[1, 5], help="of result files")
    c.add_argument("--table", type=int, nargs="+", choices=TABLES)
    c.add_argument("--results", help="folder that `run` filled")
    c.add_argument("--on", nargs="+", help="data sets to show (default: the paper's)")
    c.add_argument("--format", choices=("markdown", "latex"), default="markdown")
    c.add_argument("--out", help="file for the tables (default: the terminal)")
    c.set_defaults(call=show)
    args = p.parse_args(argv)
    return args.call(args)


if __name__ == "__main__":
    command_line(main)
