"""Every picture, drawn from files that the stages wrote.

    python -m experiments.figures method     --out docs/method.svg
    python -m experiments.figures prototypes --prototypes prototypes.npz --out figure3.png
    python -m experiments.figures training   --run RUN [--run RUN ...] --out training.png
    python -m experiments.figures steps      --run RUN [--run RUN ...] --out steps.png
    python -m experiments.figures retrieval  --json retrieval.json [--versus other.json] [--split 2] --out figure4.png
    python -m experiments.figures lambda     --results DIR [--on ucf101] --out lambda.png
    python -m experiments.figures features   --features FILE [--versus FILE] --view rgb --out features.png
    python -m experiments.figures confusion  --json finetune.json [--split 2] --view rgb+flow --out confusion.png

method: Fig. 2 in our own hand (method.py), from no file. prototypes: Fig. 3, t-SNE of the prototypes
before (random) and after Eq. 11, and the cosine of each to its nearest. training: the curves of one or several
RUN/log.jsonl. steps: R@1 of a run's checkpoints (pretrain.py --keep; RUN/*.json, results of evaluate.py retrieval) and
the effective rank of both views over its steps. retrieval: Fig. 4, queries with their nearest videos, right and wrong
ones framed and marked; with --versus the same queries answered by another network. lambda: Table 2, the paper's beside
ours (`experiments.tables run --table 2`). features: t-SNE of a file of features of evaluate.py by class. confusion:
classes against what a classifier, or the nearest neighbour, says. Of a result of several splits the first is drawn, or
that of --split.
"""

import argparse
import statistics
from pathlib import Path

import matplotlib
import numpy as np
import torch

from experiments import method
from experiments.paper import LAMBDA_GRID, LAMBDAS, TABLES
from experiments.result_files import confusion_table, curve, load_retrieval, of_split, one_query_a_class, read_log
from experiments.tables import check_comparable, collect, load, ours
from support.cli import Subcommand, command_line, positive_int, random_seed, say
from support.errors import BadInput
from support.features import view_matrix
from support.files import atomic, check_writable, load_arrays
from support.page import readable
from support.videos import decode, film_length, frames_at

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.backend_bases import FigureCanvasBase

# Okabe and Ito's colours, which colour-blind readers can tell apart; right and wrong have marks of their own too
COLOURS = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#B8A900"
RIGHT, WRONG = "#0072B2", "#D55E00"


def check_picture(path):
    """Before anything is drawn: raise BadInput if --out could not be written, or its suffix is of no picture."""
    known = FigureCanvasBase.get_supported_filetypes()
    if Path(path).suffix.lower().removeprefix(".") not in known:
        raise BadInput(f"--out {path} has no suffix of a picture; end its name in one of .{', .'.join(sorted(known))}")
    check_writable(path, "--out")


def plain(name):
    """A name, as of a class or a folder, that Matplotlib shows as it is: a $ begins no formula."""
    return readable(name).replace("$", r"\$")


def save(figure, path):
    """Write a figure under a temporary name, then rename it."""
    with atomic(path) as tmp:
        figure.savefig(tmp, dpi=150, bbox_inches="tight")
    plt.close(figure)
    say(f"written: {path}")


# ---------------------------------------------------------------------------------------------------------------------
# Fig. 3
# ---------------------------------------------------------------------------------------------------------------------
def prototypes(args):
    """t-SNE and nearest-neighbour cosines of random and of fitted prototypes."""
    from sklearn.manifold import TSNE  # here: its import takes longer than the other figures

    _, arrays = load_arrays(args.prototypes, "prototypes", "python prototypes.py --out FILE")
    fitted = arrays["prototypes"]
    n, d = fitted.shape
    if n < 2:
        raise BadInput(f"{args.prototypes} holds one prototype; the picture shows how far several lie from each other")
    random = np.random.default_rng(0).standard_normal((n, d))
    random /= np.linalg.norm(random, axis=1, keepdims=True)
    nearest = []
    for points in (random, fitted):
        gram = points @ points.T
        np.fill_diagonal(gram, -2)
        nearest.append(gram.max(1))
    low, high = min(x.min() for x in nearest), max(x.max() for x in nearest)
    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    names = "random", "after Eq. 11"
    for axis, points, cosine, name in zip(axes, (random, fitted), nearest, names, strict=False):
        at = TSNE(init="random", perplexity=min(30, (n - 1) / 3), random_state=0).fit_transform(points)
        dots = axis.scatter(*at.T, s=14, c=cosine, cmap="cividis_r", vmin=low, vmax=high)
        axis.set(title=f"{name}: {n} prototypes, {d}-d (t-SNE)", xticks=[], yticks=[])
        axis.set_box_aspect(1)
    figure.colorbar(dots, ax=axes[1], label="cosine to the nearest", shrink=0.85)
    # in common bins and on a logarithmic axis: after Eq. 11 nearly all may be in one
    labels = [f"{name}\nmean {x.mean():.4f}, max {x.max():.4f}" for name, x in zip(names, nearest, strict=True)]
    axes[2].hist(nearest, bins=np.linspace(low - 0.01, high + 0.01, 41), alpha=0.85, histtype="stepfilled", log=True,
                 label=labels, color=(WRONG, RIGHT))
    axes[2].set(title="cosine to the nearest", xlabel="cosine", ylabel="prototypes")
    axes[2].set_box_aspect(1)
    axes[2].legend(loc="upper right", fontsize=8)
    save(figure, args.out)


# ---------------------------------------------------------------------------------------------------------------------
# Training curves
# ---------------------------------------------------------------------------------------------------------------------
CURVES = {"loss": "loss", "entropy": "entropy of an assignment (nats)", "prototypes_in_use": "prototypes in use",
          "rank": "rank of the features (poorer view)", "views_agree": "views agree (share of samples)",
          "lr": "learning rate", "samples_per_s": "videos a second", "data_wait": "share of time waiting"}


def training(args):
    """Eight curves of each run's log over its epochs."""
    figure, axes = plt.subplots(2, 4, figsize=(17, 6.5))
    for run in args.run:
        log = read_log(run)
        if not log.steps:
            raise BadInput(f"{log.path} holds no step yet")
        label = plain(f"{Path(run).name.removesuffix('.jsonl')} ({log.settings['method']})")
        for axis, key in zip(axes.flat, CURVES, strict=True):
            if found := curve(log.steps, key):
                axis.plot(*zip(*found, strict=True), label=label)
        ln_n = log.starts[0]["ln_n"]
        for axis in axes.flat[:2]:
            axis.axhline(ln_n, color="grey", lw=0.8, ls=":")
    for axis, title in zip(axes.flat, CURVES.values(), strict=True):
        axis.set(title=title, xlabel="epoch")
    for axis in axes.flat[:2]:
        axis.annotate("ln N", (0, ln_n), color="grey", va="bottom")
    axes[0, 0].legend()
    figure.tight_layout()
    save(figure, args.out)


def steps(args):
    """A column a run: R@1 of its checkpoints by view, and below the effective rank of both views, over the steps."""
    figure, axes = plt.subplots(2, len(args.run), figsize=(4.6 * len(args.run), 5.2), sharex=True, sharey="row",
                                squeeze=False, layout="constrained")
    for (above, below), run in zip(axes.T, args.run, strict=True):
        log, points, first = read_log(run), {}, None
        for path in sorted(Path(run).glob("*.json")):
            result = load(path)
            protocol = result["protocol"]
            if (command := protocol.get("command", "retrieval")) != "retrieval":
                say(f"left out: {path}, a result of evaluate.py {command}")
                continue
            of = {**protocol.get("pretraining", {}), "method": protocol["method"]}
            if not any(all(of.get(k) == start["settings"].get(k) for k in ("method", "seed", "lr", "epochs", "lead"))
                       for start in log.starts):  # pretrain.py --extend begins anew with more epochs
                raise BadInput(f"{path} is of another run than {log.path}")
            first = first or (path, protocol)
            check_comparable(path, protocol, *first)
            for view, found in result["results"].items():
                points.setdefault(view, []).append((protocol["step"], found["R@1"]))
        if not points:
            raise BadInput(f"{run} holds no *.json of retrieval; evaluate its checkpoints: python evaluate.py "
                           f"retrieval --checkpoint {run}/checkpoint.1.pt --json {run}/checkpoint.1.json")
        for colour, mark, view in zip(COLOURS, "os^", ("rgb", "flow", "rgb+flow"), strict=False):
            if view in points:
                above.plot(*zip(*sorted(points[view]), strict=True), color=colour, marker=mark, label=view)
            if found := curve(log.steps, f"effective_rank_{view}", "step"):
                below.plot(*zip(*found, strict=True), color=colour, label=view)
        above.set(title=f"{plain(Path(run).name)}: R@1 (%)", ylim=(0, 100))
        below.set(title="effective rank of the features", xlabel="step")
    axes[0, 0].legend()
    save(figure, args.out)


# ---------------------------------------------------------------------------------------------------------------------
# Fig. 4
# ---------------------------------------------------------------------------------------------------------------------
def frame_of(video):
    """A frame of a video of a result, RGB: the middle one, of a segment its first."""
    path = video["path"]
    try:
        ((_, frame),) = frames_at(path, [video.get("first_frame", film_length(path) // 2)])
    except (BadInput, ValueError):  # it ends before that
        ((_, frame),) = frames_at(path, [sum(1 for _ in decode(path)) // 2])
    return frame[..., ::-1]


def tile(axis, video, classes, right=None):
    """A video's frame with its class, framed and marked as a right or wrong answer (None: a query)."""
    mark, colour = {None: ("", "black"), True: ("✓ ", RIGHT), False: ("✗ ", WRONG)}[right]
    axis.imshow(frame_of(video))
    axis.set(xticks=[], yticks=[])
    name = readable(classes[video["label"]])
    axis.set_xlabel(mark + plain(name if len(name) < 16 else name[:14] + "…"), fontsize=8, color=colour, labelpad=3)
    for side in axis.spines.values():
        side.set(color=colour, linewidth=3, linestyle="--" if right is False else "-")


def retrieval(args):
    """Rows: queries of different classes. Columns: the query, then each network's nearest videos."""
    results = [load_retrieval(f, args.split) for f in (args.json, args.versus) if f]
    for r in results:
        if args.view not in r["neighbours"]:
            raise BadInput(f"there is no view {args.view} in it; it holds {', '.join(r['neighbours'])}")
        if [q["path"] for q in r["queries"]] != [q["path"] for q in results[0]["queries"]]:
            raise BadInput(f"{args.json} and {args.versus} answer different queries")
        check_comparable(args.versus, r["protocol"], args.json, results[0]["protocol"])
    queries, classes = results[0]["queries"], results[0]["classes"]
    rows = one_query_a_class(queries, args.rows, args.seed)
    k = min(args.neighbours, *(len(r["neighbours"][args.view][0]) for r in results))
    if k < args.neighbours:
        say(f"--neighbours {args.neighbours}: the results keep {k} of each query, which are drawn")
    columns = 1 + len(results) * (k + 1)
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.15 * columns, 1.35 * len(rows)), squeeze=False,
                                gridspec_kw={"width_ratios": [1] + ([0.25] + [1] * k) * len(results)})
    for line, i in zip(axes, rows, strict=True):
        tile(line[0], queries[i], classes)
        for b, r in enumerate(results):
            at = 1 + b * (k + 1)
            line[at].axis("off")
            for axis, j in zip(line[at + 1:], r["neighbours"][args.view][i][:k], strict=False):
                video = r["gallery"][j]
                tile(axis, video, classes, video["label"] == queries[i]["label"])
    axes[0, 0].set_title("query", fontsize=9)
    for b, r in enumerate(results):
        p = r["protocol"]
        axes[0, 2 + b * (k + 1)].set_title(f"{p['method']}, {args.view}: R@1 {r['results'][args.view]['R@1']:.1f}",
                                           fontsize=9, loc="left")
    save(figure, args.out)


# ---------------------------------------------------------------------------------------------------------------------
# Table 2, features, confusion
# ---------------------------------------------------------------------------------------------------------------------
def lambdas(args):
    """Two heat maps, rows lambda2, columns lambda1: the paper's R@1 and ours, mean and deviation over the seeds, grey
    where there is no run."""
    size = len(LAMBDAS), len(LAMBDAS)
    grid, spread = np.full(size, np.nan), np.full(size, np.nan)
    counts = set()
    for i, (row, found) in enumerate(zip(TABLES[2].rows, collect(TABLES[2], args.results, args.on), strict=True)):
        counts.add(len(found))
        if found:
            grid.flat[i], _ = ours(found, row.view, "R@1")
        if len(found) > 1:
            spread.flat[i] = statistics.stdev(r["results"][row.view]["R@1"] for r in found.values())
    if np.isnan(grid).all():
        raise BadInput(f"{args.results} holds no run of Table 2 evaluated on {args.on}; make some with: "
                       f"python -m experiments.tables run --table 2")
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2))
    seeds = f"{max(counts)} seed{'s' if max(counts) > 1 else ''}{' at most' if len(counts) > 1 else ''}"
    for axis, values, deviations, title in (
            (axes[0], np.array(LAMBDA_GRID), np.full(size, np.nan), "paper: UCF101, RGB, 200 epochs"),
            (axes[1], grid, spread, f"ours: {plain(args.on)}, RGB, {seeds}")):
        colours = matplotlib.colormaps["cividis"].with_extremes(bad="0.85")
        image = axis.imshow(values, cmap=colours)
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for (y, x), value in np.ndenumerate(values):
            shown = "not run" if np.isnan(value) else f"{value:.1f}"
            if not np.isnan(deviations[y, x]):
                shown += f"\n± {deviations[y, x]:.1f}"
            axis.text(x, y, shown, ha="center", va="center", fontsize=8 if np.isnan(value) else 11,
                      color="white" if value < middle else "black")
        axis.set(title=title, xlabel="lambda1 (entropy)", ylabel="lambda2 (prior)", xticks=range(len(LAMBDAS)),
                 yticks=range(len(LAMBDAS)), xticklabels=LAMBDAS, yticklabels=LAMBDAS)
        best = np.unravel_index(np.nanargmax(values), values.shape)
        axis.add_patch(plt.Rectangle((best[1] - 0.47, best[0] - 0.47), 0.94, 0.94, fill=False, color=WRONG, lw=3))
        figure.colorbar(image, ax=axis, label="R@1", shrink=0.85)
    figure.tight_layout()
    save(figure, args.out)


def features(args):
    """t-SNE of one or two files of features, the classes with most videos in colours.

    Features are centred first: those of a network with ReLU share one large direction, which else is all that one sees.
    """
    from sklearn.manifold import TSNE

    files = [f for f in (args.features, args.versus) if f]
    figure, axes = plt.subplots(1, len(files), figsize=(6.2 * len(files), 5.6), squeeze=False)
    for axis, file in zip(axes.flat, files, strict=True):
        header, arrays = load_arrays(file, "features", "python evaluate.py features")
        labels = arrays["labels"]
        shown = np.argsort(-np.bincount(labels, minlength=len(header["classes"])), kind="stable")[:args.classes]
        own = np.isin(labels, shown)
        if own.sum() < 5:
            raise BadInput(f"{file} holds {own.sum()} videos, too few for a map")
        if lacking := set(args.view.split("+")) - arrays.keys():
            raise BadInput(f"{file} holds no features of {lacking.pop()}")
        for view in args.view.split("+"):
            if np.ptp(arrays[view][own], axis=0).max() <= 1e-6 * np.abs(arrays[view][own]).max():  # but for rounding
                raise BadInput(f"{file}: the features of {view} are the same for all {own.sum()} videos; there is no "
                               f"map of a network that has collapsed")
        values = {v: torch.from_numpy(arrays[v]) for v in args.view.split("+")}
        x = view_matrix(values, args.view, "coclr", "average").numpy()[own]
        at = TSNE(init="pca", perplexity=min(30, (len(x) - 1) / 3), random_state=0).fit_transform(x)
        for i, c in enumerate(sorted(shown)):
            axis.scatter(*at[labels[own] == c].T, s=26, color=COLOURS[i % 8], marker="os^DvPX"[i % 7], linewidths=0,
                         label=plain(header["classes"][c]))  # 56 pairs of colour and shape
        run = "/".join(Path(file).absolute().parts[-4:-2])
        axis.set(title=f"{plain(run)}: {args.view}, {own.sum()} videos (t-SNE)", xticks=[], yticks=[])
    axes.flat[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    figure.tight_layout()
    save(figure, args.out)


def confusion(args):
    """Rows: classes. Columns: predictions, in percent of the row. Two panels for two results."""
    files = [f for f in (args.json, args.versus) if f]
    results = [of_split(f, args.split, "linear|finetune|retrieval") for f in files]
    n = len(results[0].get("classes", ()))
    side = min(14, 2.5 + 0.42 * n)
    figure, axes = plt.subplots(1, len(files), figsize=((side + 1) * len(files), side), squeeze=False)
    for axis, out, file in zip(axes.flat, results, files, strict=True):
        table = confusion_table(out, args.view)
        if table is None:
            raise BadInput(f"{file} has no single videos of view {args.view}: it takes the result of retrieval, "
                           f"linear or finetune")
        names = [plain(name) for name in out["classes"]]
        share = 100 * table / np.maximum(1, table.sum(1, keepdims=True))
        image = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
        if len(names) <= 20:
            for (y, x), value in np.ndenumerate(share):
                if value:
                    axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8,
                              color="white" if value > 60 else "black")
        size = 9 if len(names) <= 20 else 4
        axis.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
        axis.set_yticks(range(len(names)), names, fontsize=size)
        p = out["protocol"]
        right = 100 * np.trace(table) / table.sum()
        axis.set(xlabel="predicted", ylabel="class",
                 title=f"{p['method']}, {p.get('command', 'retrieval')}, {args.view}: {right:.1f} % right")
        figure.colorbar(image, ax=axis, label="% of the class", shrink=0.8)
    figure.tight_layout()
    save(figure, args.out)


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m experiments.figures",
                                description="Draw figures from the files that the stages wrote.")
    commands = p.add_subparsers(dest="command", required=True, parser_class=Subcommand)
    c = commands.add_parser("prototypes", help="Fig. 3")
    c.add_argument("--prototypes", required=True, help="file of prototypes.py")
    c.set_defaults(draw=prototypes)
    c = commands.add_parser("training", help="curves of log.jsonl")
    c.add_argument("--run", action="append", required=True, help="folder of a run, or its log; may be repeated")
    c.set_defaults(draw=training)
    c = commands.add_parser("steps", help="R@1 of a run's checkpoints over its steps")
    c.add_argument("--run", action="append", required=True, help="folder with log.jsonl and results; may be repeated")
    c.set_defaults(draw=steps)
    c = commands.add_parser("retrieval", help="Fig. 4")
    c.add_argument("--json", required=True, help="result of evaluate.py retrieval")
    c.add_argument("--versus", help="another network's result on the same queries")
    c.add_argument("--view", default="rgb", choices=("rgb", "flow", "rgb+flow"))
    c.add_argument("--rows", type=positive_int, default=10, help="queries, one a class")
    c.add_argument("--neighbours", type=positive_int, default=5, help="of each query")
    c.add_argument("--seed", type=random_seed, default=0, help="of the choice of queries")
    c.set_defaults(draw=retrieval)
    c = commands.add_parser("lambda", help="Table 2 as heat maps")
    c.add_argument("--results", required=True, help="folder that experiments.tables run filled")
    c.add_argument("--on", default="ucf101", help="data set of the evaluation")
    c.set_defaults(draw=lambdas)
    c = commands.add_parser("features", help="t-SNE of features by class")
    c.add_argument("--features", required=True, help="file that evaluate.py features wrote")
    c.add_argument("--versus", help="another such file")
    c.add_argument("--view", default="rgb", choices=("rgb", "flow", "rgb+flow"))
    c.add_argument("--classes", type=positive_int, default=10, help="those with most videos")
    c.set_defaults(draw=features)
    c = commands.add_parser("confusion", help="confusion matrix")
    c.add_argument("--json", required=True, help="result of evaluate.py retrieval, linear or finetune")
    c.add_argument("--versus", help="another such result")
    c.add_argument("--view", default="rgb", choices=("rgb", "flow", "rgb+flow"))
    c.set_defaults(draw=confusion)
    c = commands.add_parser("method", help="Fig. 2, in our own hand")
    c.set_defaults(draw=lambda args: save(method.draw(), args.out))
    for name in ("retrieval", "confusion"):
        commands.choices[name].add_argument("--split", type=int, help="of a result on several (default: the first)")
    for c in commands.choices.values():
        c.add_argument("--out", required=True, help="picture to write")
    args = p.parse_args(argv)
    check_picture(args.out)
    args.draw(args)
    return 0


if __name__ == "__main__":
    command_line(main)
