"""Settings of pre-training compared over seeds: a result is a distribution.

    python -m experiments.compare run  results/guiding_28/experiment.json --work runs/guiding_28
    python -m experiments.compare show results/guiding_28/experiment.json [--settings NAME ...] [--versus NAME ...] \\
        [--of retrieval cluster linear finetune]
    python -m experiments.compare draw results/guiding_28/experiment.json --out seeds.png

In   an experiment, a JSON file:
     {"set": {"dataset": ..., "videos": ..., "splits": ..., "flow": ...}, "prototypes": FILE, "processes": 2,
      "flags": "of pretrain.py in every setting", "settings": {name: "more flags", ...}, "seeds": [...],
      "versus": a name of `settings`; and where wanted "evaluate": "flags of evaluate.py", "untrained": "those of the
      network and its clips", for a row `untrained` of what evaluate.py finds without pre-training, and "downstream":
      {"cluster", "linear" or "finetune": {"flags": "of evaluate.py", "settings": [...], "seeds": [...], "processes":
      of fine-tuning}, ...}, settings and seeds where not all are meant, processes where they aren't pre-training's}
Out  beside it <setting>/seed<k>.json (evaluate.py retrieval), seed<k>.<command>.json (what is downstream) and
     seed<k>.jsonl (the run's log), and commands.jsonl: each command with its seconds and status. Checkpoints stay in
     --work.

run: seed by seed, so that what is there so far is paired; what is done is not done again, and an interrupted run goes
on. show: R@1 of each setting, mean and standard deviation over seeds, seeds on which a view learned, what the log says
at the end (effective rank of the features by view, how often both views choose one prototype), what is downstream, and,
seed by seed against `versus`, the mean difference, its standard error and p of a paired t-test (two-sided); and in
which clips or network the rows differ. draw: every
seed's R@1, means with their standard errors, and both views' effective rank over the steps, which shows when a view
began to learn.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import statistics
from pathlib import Path
from types import SimpleNamespace

from scipy.stats import ttest_rel

from experiments.driver import Driver
from experiments.paper import TABLES
from experiments.result_files import curve, read_log
from experiments.tables import check_comparable, load
from support.cli import Subcommand, command_line
from support.errors import BadInput
from support.files import check_folder

VIEWS = ("rgb", "flow", "rgb+flow")
NEEDED = {"set": dict, "prototypes": str, "processes": int, "flags": str, "settings": dict, "seeds": list,
          "versus": str}
OPTIONAL = {"evaluate": str, "untrained": str, "downstream": dict}
DOWNSTREAM = {"flags": str, "settings": list, "seeds": list, "processes": int}
AT_THE_END = {"effective rank of rgb": ("effective_rank_rgb", 1), "of flow": ("effective_rank_flow", 1),
              "views agree (%)": ("views_agree", 100)}  # of the log, what needs no labels: its name there, a factor
CLIPS = ("arch", "width", "frames", "stride", "size", "precision")  # rows may differ in them: `show` says so
METRICS = {TABLES[n].command: TABLES[n].metrics for n in (6, 8, 7)}  # downstream; differences are of the first


def read_experiment(path, settings=None, versus=None):
    """An experiment's file -> its fields, `folder`, and names: `rows`, all or those of `settings`, and `versus`, what
    they are compared with, its own or those given. Raises BadInput where it is not as described above."""
    try:
        fields = json.loads(Path(path).read_text("utf-8-sig"))
        wrong = [f"{k} is none of its fields" for k in fields if k not in NEEDED | OPTIONAL]
        fields = {k: kind() for k, kind in OPTIONAL.items()} | fields
        wrong += [f"{k} must be {kind.__name__}" for k, kind in (NEEDED | OPTIONAL).items()
                  if not isinstance(fields.get(k), kind)]
        wrong += [f"{k} of {name} must be str" for k in ("set", "settings") if isinstance(fields.get(k), dict)
                  for name, value in fields[k].items() if not isinstance(value, str)]
    except (OSError, ValueError, TypeError) as e:
        raise BadInput(f"{path} is no JSON file of an experiment ({e}); see experiments/compare.py") from e
    if wrong:
        raise BadInput(f"{path}: {'; '.join(wrong)}; see experiments/compare.py")
    x = SimpleNamespace(**fields, folder=Path(os.path.abspath(path)).parent)
    x.rows = [*x.settings, *(["untrained"] if x.untrained else [])]  # their names are those of the results' folders
    x.versus = versus or [x.versus]
    named = {"versus": x.versus, "--settings": settings or []}
    for command, its in x.downstream.items():
        if command not in METRICS or not isinstance(its, dict) or not all(
                isinstance(value, DOWNSTREAM.get(k, ())) for k, value in its.items()):
            raise BadInput(f"{path}: downstream knows {', '.join(METRICS)}, each with flags (text), settings and seeds "
                           f"(lists), processes (a number); not {json.dumps({command: its})}")
        named[f"downstream {command}"] = its.get("settings", [])
    check_values(path, x)
    for where, names in named.items():
        for name in (n for n in names if n not in x.rows):
            raise BadInput(f"{path}: {where} {name} is none of its settings ({', '.join(x.rows)})")
    x.rows = settings or x.rows
    if lacking := set(versus or ()) - set(x.rows):
        raise BadInput(f"--versus {lacking.pop()} is not among --settings {' '.join(x.rows)}")
    return x


def check_values(path, x):
    """Raise BadInput where names of settings can't be those of folders, seeds are none, or flags are no words."""
    wrong = [f"settings {name!r} can't be the name of a folder" for name in x.settings
             if name in (".", "..") or not re.fullmatch(r"[^/\0]+", name)]
    if x.untrained and "untrained" in x.settings:
        wrong.append("settings untrained has the name of the row that the field untrained makes")
    flags = {"flags": x.flags, "evaluate": x.evaluate, "untrained": x.untrained,
             **{f"settings {name}": words for name, words in x.settings.items()},
             **{f"downstream {command}": its.get("flags", "") for command, its in x.downstream.items()}}
    for where, words in flags.items():
        try:
            shlex.split(words)
        except ValueError as e:
            wrong.append(f"{where} can't be split into words ({e})")
    processes = [x.processes, *(its["processes"] for its in x.downstream.values() if "processes" in its)]
    wrong += [f"processes must be at least 1, not {json.dumps(n)}" for n in processes if n is True or n < 1]
    seeds = [*x.seeds, *(seed for its in x.downstream.values() for seed in its.get("seeds", ()))]
    wrong += [f"seeds must be whole numbers of at least 0, not {json.dumps(s)}" for s in seeds
              if type(s) is not int or s < 0]
    if wrong:
        raise BadInput(f"{path}: {'; '.join(wrong)}; see experiments/compare.py")


# ---------------------------------------------------------------------------------------------------------------------
# run
# ---------------------------------------------------------------------------------------------------------------------
def evaluations(x, name, seed):
    """What evaluate.py is to find of a row and seed -> [(command, its flags, file for the result), ...]."""
    result = x.folder / name / f"seed{seed}.json"
    wanted = [("retrieval", x.evaluate, result)]
    for command, its in x.downstream.items():
        if name in its.get("settings", x.rows) and seed in its.get("seeds", x.seeds):
            wanted.append((command, its.get("flags", ""), result.with_suffix(f".{command}.json")))
    return [(command, shlex.split(flags), out) for command, flags, out in wanted]


def run(args):
    """Pre-train and evaluate every setting on every seed -> 0, or 1 where a command failed."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    x, work = read_experiment(args.experiment), Path(os.path.abspath(args.work))
    for folder, what in {work: "--work", x.folder: "the experiment's folder",
                         **{x.folder / name: f"the folder of {name}," for name in x.rows}}.items():
        check_folder(folder, what)
    driver = Driver(x.folder, work)
    data_set = [word for key, value in x.set.items() for word in (f"--{key}", value)]
    for seed, name in ((seed, name) for seed in x.seeds for name in x.rows):
        run_folder, log = work / name / f"seed{seed}", x.folder / name / f"seed{seed}.jsonl"
        if name not in x.settings:
            network = ["--checkpoint", "none", *shlex.split(x.untrained), "--seed", str(seed)]
            features = ["--features", str(run_folder / "features")]
        else:
            network, features = ["--checkpoint", str(run_folder)], []  # beside the checkpoint
            command = ["pretrain.py", *shlex.split(x.flags), *data_set, "--prototypes", x.prototypes, "--out",
                       str(run_folder), *shlex.split(x.settings[name]), "--seed", str(seed)]
            checkpoint = run_folder / "checkpoint.pt"
            if log.with_suffix(".json").exists():
                driver.check(command, checkpoint)
            else:
                trained = driver(command, checkpoint, run_folder / "pretrain.log", x.processes)
                if (run_folder / "log.jsonl").exists():  # of a run that failed, too
                    shutil.copyfile(run_folder / "log.jsonl", log)
                if not trained:
                    continue
        for command, flags, out in evaluations(x, name, seed):
            tuned = command == "finetune"
            folder = ["--out", str(run_folder / command)] if tuned else features
            words = ["evaluate.py", command, *network, *data_set, *folder, *flags, "--json", str(out)]
            if out.exists():
                driver.check(words, out)
            else:
                processes = x.downstream[command].get("processes", x.processes) if tuned else 1
                driver(words, out, run_folder / f"{command}.log", processes)
    for log in driver.failed:
        print(f"failed: {log}")
    return 1 if driver.failed else 0


# ---------------------------------------------------------------------------------------------------------------------
# show
# ---------------------------------------------------------------------------------------------------------------------
def collect(x, command="retrieval", metric="R@1"):
    """A number of an experiment's results -> {row: {seed: {view: number}}}. Raises BadInput where two can't be
    compared."""
    found, first = {}, None
    for name in x.rows:
        found[name] = {}
        for seed in x.seeds:
            path = x.folder / name / f"seed{seed}{'' if command == 'retrieval' else f'.{command}'}.json"
            if path.exists():
                r = load(path, command)
                first = first or (path, r["protocol"])
                check_comparable(path, r["protocol"], *first)
                found[name][seed] = {view: v[metric] for view, v in r["results"].items()}
    return found


def differing(x):
    """In which of CLIPS the rows' results differ -> ["frames: 8 (sep), 16 (goca)", ...]."""
    named = {key: {} for key in CLIPS}
    for name, seed in ((name, seed) for name in x.rows for seed in x.seeds):
        if (path := x.folder / name / f"seed{seed}.json").exists():
            protocol = load(path, "retrieval")["protocol"]
            for key in CLIPS:
                named[key].setdefault(protocol.get(key), {})[name] = None
    return [f"{key}: " + ", ".join(f"{value} ({' '.join(names)})" for value, names in values.items())
            for key, values in named.items() if len(values) > 1]


def columns_of(found):
    """What `collect` found -> (its views, {row: [{seed: number}, one a view]})."""
    views = [v for v in VIEWS if any(v in r for seeds in found.values() for r in seeds.values())]
    return views, {name: [{s: r[v] for s, r in seeds.items() if v in r} for v in views]
                   for name, seeds in found.items()}


def logs_of(x, name):
    """The logs of a row by seed, {seed: file}: of the experiment's seeds, those of runs that failed too."""
    every = {seed: x.folder / name / f"seed{seed}.jsonl" for seed in x.seeds}
    return {seed: path for seed, path in every.items() if path.exists()}


def paired(ours, theirs):
    """R@1 by seed of two settings, {seed: number} -> (seeds in both, mean difference, its standard error, p); None
    where fewer than three seeds are in both."""
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 3:
        return None
    a, b = [ours[s] for s in seeds], [theirs[s] for s in seeds]
    differences = [u - v for u, v in zip(a, b, strict=True)]
    error = statistics.stdev(differences) / len(seeds) ** 0.5
    p = float(ttest_rel(a, b).pvalue) if error else float(not any(differences))
    return len(seeds), statistics.mean(differences), error, p


def mean_and_deviation(values):
    """"mean ± standard deviation" of numbers; one by itself, a dash for none."""
    values = list(values)
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "–"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def table(*rows):
    """Rows of cells as lines of Markdown, the first the head."""
    head, *rest = (f"| {' | '.join(cells)} |" for cells in rows)
    return [head, "|---" * len(rows[0]) + "|", *rest]


def differences(x, found, of=""):
    """Tables of differences from each of x.versus, seed by seed."""
    views, columns = columns_of(found)
    for versus in (v for v in x.versus if v in columns):
        rows = [(f"{of}minus {versus}, seed by seed", *views)]
        for name in (name for name in columns if name != versus):
            pairs = [paired(ours, theirs) for ours, theirs in zip(columns[name], columns[versus], strict=True)]
            if any(pairs):
                cells = (f"{d[1]:+.1f} ± {d[2]:.1f}, p = {d[3]:.2g} ({d[0]})" if d else "–" for d in pairs)
                rows.append((name, *cells))
        yield rows


def downstream_tables(x, of):
    """Tables of the commands `of`, downstream: each metric as mean ± deviation over seeds, differences of the first."""
    for command in (c for c in of if c in x.downstream):
        every = [collect(x, command, metric) for metric in METRICS[command]]
        views, _ = columns_of(every[0])
        by_metric = [columns_of(found)[1] for found in every]
        levels = [(f"{command}: {' / '.join(METRICS[command])}", "seeds", *views)]
        for name in (name for name, seeds in every[0].items() if seeds):
            cells = [" / ".join(mean_and_deviation(c[name][k].values()) for c in by_metric) for k in range(len(views))]
            levels.append((name, str(len(every[0][name])), *cells))
        yield levels
        yield from differences(x, every[0], f"{command}: {METRICS[command][0]} ")


def retrieval_tables(x, learned):
    """Tables of R@1 by row and view, of the log's end, and of differences."""
    found = collect(x)
    views, by_view = columns_of(found)
    levels = [("R@1", "seeds", *views, *(f"{v} > {learned:g}" for v in views))]
    ends = [("at the end, by the log", *AT_THE_END)]
    for name, columns in by_view.items():
        logs, n = logs_of(x, name), len(found[name])
        lacking = len(logs.keys() - found[name].keys())
        failed = f", {lacking} without a result" if lacking else ""
        above = [f"{sum(r > learned for r in c.values())} of {len(c)}" for c in columns]
        levels.append((name, f"{n}{failed}", *(mean_and_deviation(c.values()) for c in columns), *above))
        whole = [read_log(log).steps for seed, log in logs.items() if seed in found[name]]  # what failed has no end
        last = [[factor * points[-1][1] for points in (curve(steps, key) for steps in whole) if points]
                for key, factor in AT_THE_END.values()]
        if whole:
            ends.append((name, *map(mean_and_deviation, last)))
    return [levels, ends, *differences(x, found)]


def lines(x, learned, of):
    """The tables of the commands `of` as lines of Markdown."""
    every = [*(retrieval_tables(x, learned) if "retrieval" in of else ()), *downstream_tables(x, of)]
    return [line for rows in every if len(rows) > 1 for line in (*table(*rows), "")][:-1]


def show(args):
    x = read_experiment(args.experiment, args.settings, args.versus)
    print("\n".join(lines(x, args.learned, args.of)))
    print("\nIn percent: mean ± standard deviation over seeds. Differences: mean ± its standard error, p of the paired "
          "t-test, (seeds in both).")
    for line in differing(x):
        print(f"The rows are not of the same {line}.")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# draw
# ---------------------------------------------------------------------------------------------------------------------
def draw(args):
    from matplotlib import pyplot as plt  # here: its import takes longer than `show`

    from experiments.figures import COLOURS, check_picture, plain, save

    check_picture(args.out)
    x = read_experiment(args.experiment, args.settings)
    found = collect(x)
    if not any(found.values()):
        raise BadInput(f"{args.experiment} has no result to draw; make some with: python -m experiments.compare run")
    views, _ = columns_of(found)
    figure, axes = plt.subplots(1, 3, figsize=(8.8, 3.2), layout="constrained", width_ratios=(1.4, 1, 1))
    width = min(0.22, 0.8 / len(found))
    for k, (name, seeds) in enumerate(found.items()):
        colour, at = COLOURS[k % len(COLOURS)], [v + width * (k - (len(found) - 1) / 2) for v in range(len(views))]
        for place, view in zip(at, views, strict=True):
            values = [r[view] for r in seeds.values() if view in r]
            axes[0].scatter([place] * len(values), values, s=14, color=colour, alpha=0.5)
            if len(values) > 1:
                error = statistics.stdev(values) / len(values) ** 0.5
                axes[0].errorbar(place + width / 3, statistics.mean(values), error, fmt="os"[k % 2], color=colour,
                                 capsize=3)
        axes[0].scatter([], [], color=colour, marker="os"[k % 2], label=plain(f"{name}, {len(seeds)} seeds"))
        logs = [read_log(log) for seed, log in logs_of(x, name).items() if seed in seeds]
        for axis, view in zip(axes[1:], VIEWS, strict=False):
            for log in logs:
                if points := curve(log.steps, f"effective_rank_{view}", "step"):
                    axis.plot(*zip(*points, strict=True), color=colour, alpha=0.6, linestyle=("-", "--")[k % 2],
                              linewidth=1)
    for axis, view in zip(axes[1:], VIEWS, strict=False):
        axis.set(title=f"effective rank of {view}", xlabel="step")
        axis.set_ylim(bottom=1)  # after the last curve: it keeps the top where it is
    axes[0].set(title="R@1 (%): seeds, mean ± standard error", xticks=range(len(views)), xticklabels=views,
                ylim=(0, 100))
    figure.legend(loc="outside lower center", ncols=min(6, len(found)), fontsize=8)
    save(figure, args.out)
    return 0


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m experiments.compare", description="Settings compared over seeds.")
    commands = p.add_subparsers(dest="command", required=True, parser_class=Subcommand)
    c = commands.add_parser("run", help="pre-train and evaluate every setting on every seed")
    c.add_argument("experiment", help="JSON file of the experiment; results go beside it")
    c.add_argument("--work", required=True, help="folder for the runs' checkpoints")
    c.set_defaults(call=run)
    c = commands.add_parser("show", help="mean, deviation and paired tests")
    c.add_argument("experiment", help="JSON file of the experiment")
    some = {"nargs": "+", "metavar": "NAME", "help": "these rows alone, in this order"}
    c.add_argument("--settings", **some)
    c.add_argument("--versus", nargs="+", metavar="NAME",
                   help="rows that the others are compared with (default: the experiment's)")
    every = ("retrieval", *METRICS)
    c.add_argument("--of", nargs="+", choices=every, default=every, metavar="COMMAND",
                   help=f"{', '.join(every)}: these results alone")
    c.add_argument("--learned", type=float, default=30, help="R@1 above which a view has learned")
    c.set_defaults(call=show)
    c = commands.add_parser("draw", help="seeds, means and effective rank as a picture")
    c.add_argument("experiment", help="JSON file of the experiment")
    c.add_argument("--settings", **some)
    c.add_argument("--out", required=True, help="picture to write")
    c.set_defaults(call=draw)
    args = p.parse_args(argv)
    return args.call(args)


if __name__ == "__main__":
    command_line(main)
