"""The flags of evaluate.py's commands."""

import model
from support.classifiers import FINETUNE, LINEAR
from support.cli import Subcommand, fraction, non_negative_int, positive, positive_int, random_seed
from support.datasets import DATASETS

VIEWS = (*model.VIEWS, "rgb+flow")
ABOUT = {"features": "extract and keep features", "retrieval": "R@k of nearest neighbours (Tables 1-5)",
         "cluster": "Acc, NMI, F1 of k-means (Table 6)", "linear": "linear probe (Table 8)",
         "finetune": "fine-tuning (Table 7)"}


def parser():
    p = Subcommand(prog="evaluate.py", description="Evaluate a representation.")
    commands = p.add_subparsers(dest="command", required=True, parser_class=Subcommand)
    for name, about in ABOUT.items():
        c = commands.add_parser(name, help=about)
        input_flags(c, name)
        protocol_flags(c, name)
        if name in ("linear", "finetune"):
            recipe_flags(c, name)
        network_flags(c)
        run_flags(c)
    c = commands.add_parser("export", help="the backbones of a run in a file of their own, for --weights")
    c.add_argument("--checkpoint", required=True, help="a run's folder or a checkpoint")
    c.add_argument("--out", required=True, help="file to write")
    return p


def input_flags(c, name):
    g = c.add_argument_group("input and output")
    of = g.add_mutually_exclusive_group(required=True)
    of.add_argument("--checkpoint", help="a run's folder, a checkpoint, or none (untrained network)")
    of.add_argument("--weights", nargs="+", metavar="[rgb=|flow=]FILE",
                    help="an export, or weights of the released GOCA, CoCLR, ViCC, or torchvision")
    g.add_argument("--dataset", choices=DATASETS, default="folder")
    g.add_argument("--videos", help="folder of videos; not needed with --views flow")
    g.add_argument("--splits", help="folder of the data set's official lists")
    g.add_argument("--split", type=int, nargs="+", default=[1], choices=(1, 2, 3), help="several: also their mean")
    g.add_argument("--flow", help="flow store of flow.py; not needed with --views rgb")
    g.add_argument("--rgb", help="RGB store of flow.py --rgb, read in place of the videos; segments need it")
    g.add_argument("--json", help="file for the results")
    if name != "finetune":
        g.add_argument("--features", help="folder of features (default: RUN/features; none: not kept)")


def protocol_flags(c, name):
    g = c.add_argument_group("protocol")
    g.add_argument("--protocol", choices=("goca", "coclr"), default="goca", help="test views")
    g.add_argument("--views", nargs="+", choices=model.VIEWS if name == "features" else VIEWS, metavar="VIEW",
                   help="rgb, flow, rgb+flow; default: all that there are networks for")
    if name != "features":
        other = "probability" if name in ("linear", "finetune") else "similarity"
        g.add_argument("--fusion", choices=("average", other), default="average", help="of rgb+flow")
    if name not in ("features", "cluster"):
        g.add_argument("--per-class", action="store_true", help="print a table of the classes")
    if name == "cluster":
        g.add_argument("--runs", type=positive_int, default=50, help="of k-means")


def recipe_flags(c, name):
    recipes = LINEAR if name == "linear" else FINETUNE
    g = c.add_argument_group("training")
    if name == "linear":
        g.add_argument("--on", choices=("features", "clips"), default="features",
                       help="features: stored, no augmentation (fast); clips: with augmentation (faithful)")
    g.add_argument("--recipe", choices=recipes, default="vicc")
    g.add_argument("--epochs", type=positive_int,
                   help=f"default: {', '.join(f'{r.epochs} ({n})' for n, r in recipes.items())}")
    g.add_argument("--lr", type=positive, help=f"default: {', '.join(f'{r.lr} ({n})' for n, r in recipes.items())}")
    if name == "finetune":
        g.add_argument("--dropout", type=fraction, help="share of the feature's channels that each clip learns without "
                       f"(default: {', '.join(f'{r.dropout} ({n})' for n, r in recipes.items())})")
    g.add_argument("--batch-size", type=positive_int, default=32, help="a process (CoCLR, ViCC)")
    g.add_argument("--out", help="folder of checkpoints of training on clips; an interrupted one there is continued")
    g.add_argument("--scale", type=positive, nargs=2, metavar=("LOW", "HIGH"),
                   help="short side before cropping, over size (default: as in pre-training)")
    g.add_argument("--cache", action="store_true", help="keep decoded videos in memory, once a loader process")


def network_flags(c):
    g = c.add_argument_group("network (of --checkpoint none; others know their own)")
    g.add_argument("--arch", choices=model.ARCHITECTURES)
    g.add_argument("--width", type=positive)
    g.add_argument("--pool", choices=("avg", "1x2x2"))
    g.add_argument("--frames", type=positive_int, help="of a clip (default: as trained)")
    g.add_argument("--stride", type=positive_int, help="default: as trained")
    g.add_argument("--size", type=positive_int, help="px (default: as trained)")


def run_flags(c):
    g = c.add_argument_group("run")
    g.add_argument("--seed", type=random_seed, default=0)
    g.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    g.add_argument("--workers", type=non_negative_int, default=2, help="loader processes")
    g.add_argument("--batch-views", type=positive_int, default=32, help="clips a forward pass")
