"""What the pictures and pages are drawn from: the log of a run, single results of evaluate.py.

A result's own numbers are read by experiments/tables.py (`load`); here are its videos, neighbours and predictions.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.tables import load
from support.errors import BadInput


# ---------------------------------------------------------------------------------------------------------------------
# A run's log
# ---------------------------------------------------------------------------------------------------------------------
class RunLog(NamedTuple):
    path: Path
    starts: list  # the first line, and that of each time the run was continued: {"command", "commit", "settings", ...}
    steps: list  # the lines with a loss

    @property
    def settings(self):
        return self.starts[-1]["settings"]

    @property
    def ended(self):
        return bool(self.steps) and self.steps[-1]["epoch"] > self.settings["epochs"] - 1e-6


# what the first line of a log says of its run, and of its settings, that is shown
START = {"command", "settings", "ln_n", "videos"}
SETTINGS = {"method", "epochs", "dataset", "videos", "flow", "arch", "width", "frames", "size", "lambda1", "lambda2",
            "batch_size", "lr", "optimizer", "seed"}


def read_log(run):
    """RUN/log.jsonl, or such a file itself -> RunLog; of a run that has just begun it has no steps yet.

    Raises BadInput where there is no log, or it is damaged or of another program.
    """
    path = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run)
    try:
        whole = path.read_text().rpartition("\n")[0]  # not a line that is just being written
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{path} doesn't exist; give a folder that pretrain.py wrote, or its log.jsonl") from None
    except OSError as e:
        raise BadInput(f"{path} can't be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        raise BadInput(f"{path} is no log of pretrain.py, whose lines are JSON ({e})") from e
    starts, steps = [], []
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
            if "loss" in line:
                steps.append({**line, "step": int(line["step"]), "epoch": float(line["epoch"])})
            else:
                for lacking in (*(SETTINGS - line["settings"].keys()), *(START - line.keys())):
                    raise KeyError(lacking)
                float(line["settings"]["epochs"]), float(line["ln_n"])
                starts.append(line)
        except (ValueError, KeyError, TypeError) as e:
            raise BadInput(f"{path} is damaged, or no log of pretrain.py, at line {number} ({e}); pretrain.py mends "
                           f"the log of a run that it continues") from e
    if not starts:
        raise BadInput(f"{path} is empty, or its first line has not been written yet; a log begins with the run's "
                       f"settings")
    return RunLog(path, starts, steps)


def curve(steps, key, over="epoch"):
    """[(epoch or step, value)] of the lines that have a finite number of that name."""
    return [(s[over], s[key]) for s in steps if isinstance(s.get(key), (int, float)) and math.isfinite(s[key])]


# ---------------------------------------------------------------------------------------------------------------------
# Results with their videos
# ---------------------------------------------------------------------------------------------------------------------
def of_split(path, split, command="retrieval"):
    """A result of evaluate.py on one split: that which is asked for, or the first in the file."""
    out = load(path, command)
    held = out.get("splits", {str(out["protocol"].get("split")): out})
    name = next(iter(held)) if split is None else str(split)
    if name not in held:
        raise BadInput(f"{path} holds no split {name}; it holds {', '.join(held)}")
    own = held[name]
    return {**own, "protocol": {**out["protocol"], **own.get("protocol", {}), "split": name}}


def load_retrieval(path, split):
    out = of_split(path, split)
    if lacking := {"neighbours", "queries", "gallery", "classes"} - out.keys():
        raise BadInput(f"{path} is no result of: python evaluate.py retrieval --json (no {sorted(lacking)[0]})")
    return out


def one_query_a_class(queries, many, seed=0):
    """Places of `many` queries at most, no two of a class; chance decides which, not the outcome."""
    by_class = {}
    for i in np.random.default_rng(seed).permutation(len(queries)):
        by_class.setdefault(queries[i]["label"], int(i))
    return [by_class[c] for c in sorted(by_class)][:many]


def confusion_table(out, view):
    """How often videos of a class (row) were taken for each (column): int [C, C], by the classifier, or by the nearest
    neighbour. None where a result does not hold single videos of that view."""
    if "queries" not in out or view not in out.get("predictions", out.get("neighbours", ())):
        return None
    truth = [q["label"] for q in out["queries"]]
    if "predictions" in out:
        predicted = out["predictions"][view]
    else:
        predicted = [out["gallery"][line[0]]["label"] for line in out["neighbours"][view]]
    table = np.zeros((len(out["classes"]),) * 2, int)
    np.add.at(table, (truth, predicted), 1)
    return table
