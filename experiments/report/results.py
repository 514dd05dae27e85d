"""Results of evaluate.py as HTML: tables before and after training, confusion by class."""

import os
from typing import NamedTuple

import numpy as np

from experiments.report.charts import text
from experiments.report.training import METHODS, VIEWS
from experiments.result_files import confusion_table, of_split
from experiments.tables import check_comparable
from support.errors import BadInput
from support.features import NETWORK
from support.page import Section

METRICS = {"retrieval": ("R@1", "R@5"), "cluster": ("Acc", "NMI", "F1"), "linear": ("top-1", "top-5"),
           "finetune": ("top-1", "top-5")}
COUNTS = ("queries", "gallery", "videos", "train", "test", "classes")  # of a protocol
MANY_CLASSES = 20  # more do not fit a matrix


class Result(NamedTuple):
    path: str
    command: str
    role: str  # before, after (of the run itself), or "": of another run
    name: str
    out: dict  # what evaluate.py wrote


def read_results(paths, split, settings):
    """Results of evaluate.py -> [Result]: of the untrained network, of other runs, of the run of these settings.

    Raises BadInput where a file is no such result, or two of a command can't be compared, as of other data sets.
    """
    found, first = [], {}
    for path in paths:
        if not os.path.isfile(path):
            raise BadInput(f"--json {path} is no file; evaluate.py writes one with --json")
        if path in (r.path for r in found):
            raise BadInput(f"--json names {path} twice; name each result once")
        out = of_split(path, split, "|".join(METRICS))
        p = out["protocol"]
        command = p.get("command", "retrieval")
        if command not in METRICS:
            raise BadInput(f"{path} is of evaluate.py {command}; --json takes results of {', '.join(METRICS)}")
        first_path, first_protocol = first.setdefault(command, (path, p))
        check_comparable(path, p, first_path, first_protocol)
        trained = p.get("pretraining") or {}
        own = p["method"] == settings["method"] and trained and all(settings.get(k, v) == v for k, v in trained.items())
        role = "before" if p["method"] == "untrained" else "after" if own else ""
        other = [f"--{k} {p[k]}, the run {settings[k]}" for k in NETWORK if k in p and p[k] != settings.get(k, p[k])]
        if role == "before" and other:
            raise BadInput(f"{path} is of an untrained network or of clips that the run has not ({'; '.join(other)}); "
                           f"evaluate --checkpoint none with the run's")
        name = {"before": "before training", "after": f"after, {p['method']}"}.get(
            role, f"{p['method']}: {METHODS.get(p['method'], 'another run')}")
        found.append(Result(path, command, role, name, out))
    return sorted(found, key=lambda r: ("before", "", "after").index(r.role))


def of_another_run(results):
    """A message where none of some results is of the run itself, else None."""
    if not results or any(r.role == "after" for r in results):
        return None
    return f"none of {', '.join(r.path for r in results)} is of this run: method or settings are others"


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------
def _cell(values, metric):
    if metric not in values:
        return "<td>–</td>"
    error = values.get(f"{metric} standard error", values.get(f"{metric} deviation"))
    small = "" if error is None else f" <small>± {error:.1f}</small>"
    return f'<td class="meter" style="--value:{values[metric]:.1f}%">{values[metric]:.1f}{small}</td>'


def _rows(view, results, metrics):
    rows = [(r.name, r.role, r.out["results"][view]) for r in results if view in r.out["results"]]
    values = rows[0][2]
    if chance := {m: values[f"{m} chance"] for m in metrics if f"{m} chance" in values}:
        rows.append(("chance", "chance", chance))
    head = f'<th scope="rowgroup" rowspan="{len(rows)}">{text(VIEWS.get(view, view))}</th>'
    return "".join(f'<tr class="{role}">{"" if k else head}<th scope="row">{text(name)}</th>'
                   f'{"".join(_cell(values, m) for m in metrics)}</tr>' for k, (name, role, values) in enumerate(rows))


def table(command, results):
    """The numbers of a command by view, before and after."""
    p = results[0].out["protocol"]
    every = [values for r in results for values in r.out["results"].values()]
    metrics = [m for m in METRICS[command] if any(m in values for values in every)]
    views = dict.fromkeys(view for r in results for view in r.out["results"])
    counts = ", ".join(f"{p[k]} {k}" for k in COUNTS if k in p)
    spread = "deviation of the runs of k-means" if command == "cluster" else "standard error"
    return (f'<h2>{command.capitalize()}</h2><p class="hint">{text(p["dataset"])}, split {text(p["split"])}, protocol '
            f'{text(p["protocol"])}; {counts}. Percent ± {spread}.</p>'
            f'<div class="wide"><table class="results"><thead><tr><th>view</th><th>network</th>'
            f'{"".join(f"<th>{m}</th>" for m in metrics)}</tr></thead>'
            f'{"".join(f"<tbody>{_rows(view, results, metrics)}</tbody>" for view in views)}</table></div>')


def tables(results):
    return "".join(table(command, own) for command in METRICS
                   if (own := [r for r in results if r.command == command]))


# ---------------------------------------------------------------------------------------------------------------------
# Confusion
# ---------------------------------------------------------------------------------------------------------------------
def _matrix(names, counts, share):
    columns = "".join(f'<th scope="col"><span>{text(name)}</span></th>' for name in names)
    rows = ""
    for i, name in enumerate(names):
        cells = "".join(
            f'<td class="{"own" if i == j else ""}" style="--share:{x:.0f}%" title="{text(name)} taken for '
            f'{text(names[j])}: {counts[i, j]} of {counts[i].sum()}">{f"{x:.0f}" if x else ""}</td>'
            for j, x in enumerate(share[i]))
        rows += f'<tr><th scope="row">{text(name)}</th>{cells}</tr>'
    return f'<table class="confusion"><thead><tr><td></td>{columns}</tr></thead><tbody>{rows}</tbody></table>'


def _most_confused(names, share):
    """Of many classes, those that are taken for another most often."""
    pairs = sorted(((x, i, j) for (i, j), x in np.ndenumerate(share) if i != j and x), reverse=True)[:MANY_CLASSES]
    rows = "".join(f"<tr><td>{text(names[i])}</td><td>{text(names[j])}</td><td>{x:.0f}</td></tr>" for x, i, j in pairs)
    return (f"<table><thead><tr><th>class</th><th>taken for</th><th>% of the class</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>")


def confusion(title, names, counts):
    """A confusion matrix, int [C, C], in percent of each row; of many classes, what is confused most."""
    share = 100 * counts / np.maximum(1, counts.sum(1, keepdims=True))
    right = 100 * np.trace(counts) / max(1, counts.sum())
    body = _matrix(names, counts, share) if len(names) <= MANY_CLASSES else _most_confused(names, share)
    return f'<div class="matrix"><h2>{text(title)}: {right:.1f} % right</h2><div class="wide">{body}</div></div>'


def confusion_section(results):
    """Classes against what the nearest video, or a classifier, says; RGB before training too -> [Section]."""
    parts = []
    for r in (r for r in results if r.role):
        for view in r.out["results"] if r.role == "after" else ("rgb",):
            counts = confusion_table(r.out, view)
            if counts is not None:
                parts.append(confusion(f"{VIEWS.get(view, view)}, {r.name}, {r.command}", r.out["classes"], counts))
    hint = ('<p class="hint">Row: the class of a video. Column: that of its nearest, or what the classifier says, in '
            "percent of the row. What is right stands in a frame.</p>")
    return [Section("Confusion", f'{hint}<div class="matrices">{"".join(parts)}</div>')] if parts else []
