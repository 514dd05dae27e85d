"""The flags of pretrain.py, and which of them have no effect in a run."""

import argparse
from functools import partial

import model
from support.cli import Help, Parser, fraction, non_negative, non_negative_int, positive, positive_int, random_seed
from support.datasets import DATASETS
from support.errors import BadInput


def parser(every):
    """every: --help lists all flags, not those alone that a reader of the paper sets."""
    p = Parser(description="GOCA pre-training on RGB and flow; defaults are the paper's. @FILE stands for the flags in "
                           "FILE, such as @presets/ucf101-s3d; later ones win.", formatter_class=Help,
               fromfile_prefix_chars="@")
    p.convert_arg_line_to_args = lambda line: line.lstrip("\ufeff").split("#")[0].split()  # a byte order mark, too
    p.add_argument("--help-all", action="help", help="show every flag and exit")
    for title, flags in (("input and output", input_flags), ("method", method_flags),
                         ("network and clips", network_flags), ("optimisation", optimisation_flags),
                         ("run", run_flags)):
        g = p.add_argument_group(title)
        flags(g, partial(more_flag, g, every))
    return p


def more_flag(group, every, *flags, help=None, **how):
    """A flag that --help lists only where it lists every."""
    group.add_argument(*flags, help=help if every else argparse.SUPPRESS, **how)


def input_flags(g, more):
    g.add_argument("--dataset", choices=DATASETS, default="folder")
    g.add_argument("--videos", help="folder of videos; not needed with --views flow")
    g.add_argument("--splits", help="folder of the data set's official lists")
    g.add_argument("--split", type=int, default=1, choices=(1, 2, 3), help="UCF101 and HMDB51")
    g.add_argument("--flow", help="flow store of flow.py; not needed with --views rgb")
    more("--rgb", help="RGB store of flow.py --rgb, read in place of the videos")
    more("--index", help="file of support.video_index: leave out what it found not to decode")
    g.add_argument("--prototypes", required=True, help="file of prototypes.py")
    g.add_argument("--out", required=True, help="folder of the run; an interrupted run there is continued")
    more("--init", metavar="RUN|FILE", help="begin with the weights of a run or an export")
    more("--extend", action="store_true", help="let the run in --out go on with more --epochs than it began with")


def method_flags(g, more):
    g.add_argument("--method", choices=model.METHODS, help="default: goca, of one view sview; others: baselines of "
                                                           "Table 1")
    g.add_argument("--views", nargs="+", choices=model.VIEWS, default=list(model.VIEWS), metavar="VIEW",
                   help="rgb or flow alone: SwAV on it")
    g.add_argument("--lambda1", type=positive, default=0.02, help="weight of the entropy, Eq. 5 (Table 2)")
    g.add_argument("--lambda2", type=non_negative, default=0.03, help="weight of the prior, Eq. 6")
    more("--prior-sign", type=int, choices=(1, -1), default=1, help="-1: the released code's anti-prior")
    g.add_argument("--guide-start", type=non_negative_int, default=0, help="epoch from which views guide each other")
    more("--lead", choices=("none", *model.VIEWS), default="none", help="a view that guides first, by itself unguided")
    more("--lead-epochs", type=non_negative_int, help="epochs that it leads, from then on each guides (default: 3/4)")
    more("--alternate", type=positive_int, default=50, help="vicc: epochs that one view learns, then the other")
    more("--train-prototypes", action="store_true", help='learn them too, as SwAV (Table 3, "No")')
    more("--iters", type=positive_int, default=3, help="Sinkhorn rounds (released code)")
    more("--temperature", type=positive, default=0.1, help="of the predictions (released code)")


def network_flags(g, more):
    g.add_argument("--arch", choices=model.ARCHITECTURES, default="s3d")
    g.add_argument("--width", type=positive, default=1.0, help="channel multiplier; 1 is the published network")
    more("--hidden", type=positive_int, default=2048, help="hidden units of the projection head")
    more("--heads", type=int, choices=(1, 2), default=1, help="projection heads; 1 is shared by the views")
    more("--pool", choices=("avg", "1x2x2"), default="avg", help="1x2x2: the released R(2+1)D-18 feature")
    g.add_argument("--frames", type=positive_int, default=32, help="of the 2 long crops")
    g.add_argument("--short-frames", type=positive_int, default=16, help="of the short crops")
    g.add_argument("--short-crops", type=non_negative_int, default=4, help="0: no multi-temporal-resolution")
    more("--stride", type=positive_int, default=1, help="frames between two frames of a clip")
    g.add_argument("--size", type=positive_int, default=128, help="px; the paper has 112 for r2plus1d18")
    more("--scale", type=float, nargs=2, metavar=("LOW", "HIGH"),
         help="short side before cropping, over size (default: 136/128 190/128; r2plus1d18 128/112 160/112)")
    more("--still-jitter", type=non_negative, default=0.0, metavar="J",
         help="take a share of its still picture off each RGB clip, min(1, U(0, J)); ours, for small data")


def optimisation_flags(g, more):
    more("--optimizer", choices=("lars", "adamw"), default="lars", help="adamw: for small runs")
    g.add_argument("--batch-size", type=positive_int, default=10, help="videos a process (paper: 64 GPUs with 10 each)")
    more("--sync-batch-norm", nargs="?", const="auto", choices=("auto", "torch", "own", "none"), default="auto",
         help="of several processes: statistics of the whole batch, by torch's (GPUs alone) or our own; none: each its "
              "own part's (auto: torch on GPUs, own on CPUs)")
    g.add_argument("--no-sync-batch-norm", action="store_const", const="none", dest="sync_batch_norm",
                   help=argparse.SUPPRESS)
    more("--accumulate", type=positive_int, default=1, help="batches whose gradients make one update")
    more("--keep-last", action="store_true", help="train on what does not fill an epoch's last batch, too")
    g.add_argument("--epochs", type=positive_int, default=500)
    g.add_argument("--warmup-epochs", type=non_negative_int, default=10, help="at most half of all")
    g.add_argument("--lr", type=positive, help="default: 4.8 sqrt(batch/640); adamw 0.001")
    more("--lr-start", type=non_negative, help="default: lr/16 (0.3 at 4.8)")
    more("--lr-end", type=non_negative, help="default: lr/1000 (0.0048 at 4.8)")
    more("--momentum", type=fraction, default=0.9)
    more("--weight-decay", type=non_negative, default=1e-6)
    more("--trust", type=positive, default=0.001, help="LARS trust coefficient")


def run_flags(g, more):
    g.add_argument("--seed", type=random_seed, default=0)
    g.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    g.add_argument("--workers", type=non_negative_int, help="loader processes (default: cores, at most 8)")
    more("--compile", action="store_true", help="torch.compile of the backbones")
    more("--recompute", action="store_true", help="less memory: activations again in the backward pass")
    g.add_argument("--plan", action="store_true", help="say what would be done, time a few steps, and leave")
    more("--time-limit", type=positive, default=60, help="seconds for one video's clips")
    more("--max-faults", type=non_negative, default=0.01, help="share of videos skipped at which the run stops")
    more("--timeout", type=positive, default=600, help="of several processes: seconds for a step")
    more("--cache", action="store_true", help="keep decoded videos in memory, once a loader process")
    more("--log-every", type=positive_int, default=20, help="steps")
    more("--tensorboard", action="store_true", help="the log's numbers in RUN/tensorboard, too")
    more("--save-every", type=positive_int, default=1, help="epochs")
    more("--save-minutes", type=non_negative, default=30, help="save that often within an epoch, too; 0: don't")
    more("--keep", type=positive_int, default=2, help="checkpoints, the newest among them")


ONE_VIEW = {"goca": "guiding takes the other view's assignment as its prior (Eqs. 6, 7)",
            "vicc": "each view predicts the other's assignments", "avg": "it averages the features of both",
            "sep": "both go through one head"}


def choose_views(s):
    """Settle --views and --method, which of one view is sview. Raises BadInput where they or the inputs don't fit."""
    s.views = [view for view in model.VIEWS if view in s.views]
    one = len(s.views) == 1
    s.method = s.method or ("sview" if one else "goca")
    if one and s.method != "sview":
        raise BadInput(f"--method {s.method} needs two views, for {ONE_VIEW[s.method]}; --views {s.views[0]} trains "
                       f"SwAV on that view, --method sview, the default there")
    check_inputs(s, s.views)


def default_lead_epochs(lead, epochs):
    """Three quarters of the epochs, where a view leads."""
    return 0 if lead == "none" else epochs * 3 // 4


def check_inputs(s, views):
    """Raise BadInput where what a view is read from isn't given."""
    if "flow" in views and not s.flow:
        raise BadInput("--flow is missing: the store of flow.py that flow is read from; or take --views rgb, which "
                       "needs none")
    if "rgb" in views and not s.videos:
        raise BadInput("--videos is missing: the folder of the videos; or take --views flow, which needs the flow "
                       "store alone")


def without_effect(s, p):
    """Messages about flags that differ from their default and that nothing reads in this run."""
    idle = {"method": {"goca": ["alternate"], "vicc": [], "sep": ["alternate"], "sview": ["alternate", "heads"],
                       "avg": ["alternate"]}[s.method],
            "optimizer": ["trust"] if s.optimizer != "lars" else [],
            "short_crops": ["short_frames"] if not s.short_crops else [],
            "views": ["rgb", "still_jitter"] if s.views == ["flow"] else []}
    if s.method != "goca":
        idle["method"] += ["lambda2", "prior_sign", "guide_start", "lead", "lead_epochs"]
    for cause, names in idle.items():
        for name in (name for name in names if getattr(s, name) != p.get_default(name)):
            value = getattr(s, cause)
            yield (f"--{name.replace('_', '-')} {getattr(s, name)} has no effect with --{cause.replace('_', '-')} "
                   f"{' '.join(value) if isinstance(value, list) else value}")
    if s.method == "goca" and s.guide_start >= s.epochs:
        yield f"--guide-start {s.guide_start} is not reached in --epochs {s.epochs}: the views never guide each other"
