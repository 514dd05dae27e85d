"""What was trained, where it stands, and the curves of its log, as HTML."""

import math
import shlex
import time

from experiments.report.charts import Curve, Mark, curves, text
from experiments.result_files import curve

METHODS = {"goca": "each view's assignment is guided by the other's", "sep": "two views, without guiding",
           "avg": "two views, one assignment of their mean", "sview": "SwAV on one view", "vicc": "ViCC"}
VIEWS = {"rgb": "RGB", "flow": "Flow", "rgb+flow": "RGB + flow"}
STANDS_S = 3600  # seconds without a line of the log, after which a run counts as interrupted
# the log's name of what a chart shows, the chart's title, whether ln N is marked
PANELS = (("loss", "Loss", True), ("entropy", "Entropy of an assignment, nats", True),
          ("prototypes_in_use", "Prototypes in use", False),
          ("effective_rank", "Effective rank of the features", False))
MARKS = {"warmup_epochs": "warm-up ends", "lead_epochs": "lead ends", "guide_start": "guiding begins"}
GUIDING = ("lead_epochs", "guide_start")  # of MARKS: without effect on other methods than goca


def state(log, now):
    """Where a run stands at the time `now` -> (in words, whether it goes on)."""
    last, epochs = log.steps[-1] if log.steps else None, log.settings["epochs"]
    written = log.path.stat().st_mtime
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(written))
    if log.ended:
        return f"ended, {when}: epoch {last['epoch']:g}, step {last['step']}", False
    at = f"at epoch {last['epoch']:.1f} of {epochs}, step {last['step']}" if last else "before its first step is logged"
    if now - written > STANDS_S:
        return f"{at}; nothing new since {when}: if it was interrupted, the same command continues it", False
    return f"{at}, {when}; it goes on", True


def facts(log):
    """What was trained, on what, by which command and commit."""
    first, s = log.starts[0], log.settings
    world = max(1, s.get("global_batch", 0) // s["batch_size"])
    launch = ["python"] if world == 1 else ["torchrun", "--nproc-per-node", str(world)]
    method = f"{s['method']}: {METHODS.get(s['method'], '')}"
    if s["method"] == "goca" and s.get("lead_epochs"):
        method += f"; {s['lead']} leads for {s['lead_epochs']} epochs"
    rows = {
        "Method": method,
        "Data": f"{s['dataset']}, {first['videos']} videos in {s['videos'] or s['flow']}",
        "Network": f"{s['arch']}, width {s['width']:g}; clips of {s['frames']} frames, {s['size']} px",
        "Assignment": f"{round(math.exp(first['ln_n']))} prototypes, ln N = {first['ln_n']:.3f}; "
                      f"lambda1 {s['lambda1']:g}, lambda2 {s['lambda2']:g}",
        "Training": f"{s['epochs']} epochs, batch {s['batch_size']} x {world}, learning rate {s['lr']:g} "
                    f"({s['optimizer']}), seed {s['seed']}",
        "Command": shlex.join([*launch, *first["command"]]),
        "Commit": f"{first.get('commit', 'unknown')}, torch {first.get('torch', 'unknown')}"}
    if len(log.starts) > 1:
        rows["Continued"] = "at step " + ", ".join(str(start["step"]) for start in log.starts[1:])
    if log.steps:
        last = log.steps[-1]
        rows["Last line"] = (f"loss {last['loss']:.3f}, {last.get('samples_per_s', 0):.1f} videos/s, "
                             f"{last.get('dropped', 0)} steps dropped, {last.get('skipped', 0)} videos not readable")
    shown = (f'<dt>{k}</dt><dd class="{k.lower().replace(" ", "-")}">{text(v)}</dd>' for k, v in rows.items())
    return f'<dl class="run">{"".join(shown)}</dl>'


def by_view(steps, key):
    """Curves of each view where the log has them, else of both together."""
    every = [Curve(VIEWS[view], view, curve(steps, f"{key}_{view}")) for view in ("rgb", "flow")]
    if any(c.points for c in every):
        return every + ([Curve("both", "three", curve(steps, key))] if key == "loss" else [])
    return [Curve("", "three", curve(steps, "rank" if key == "effective_rank" else key))]  # rank: of the poorer view


def charts(log):
    """The curves of a log, ln N, the end of the warm-up and of a lead marked."""
    s, ln_n, steps = log.settings, log.starts[0]["ln_n"], log.steps
    marked = [key for key in MARKS if s["method"] == "goca" or key not in GUIDING]
    how = {"x_range": (0, s["epochs"]),
           "marks": [Mark(s[key], MARKS[key]) for key in marked if 0 < s.get(key, 0) < s["epochs"]]}
    drawn = [curves(title, by_view(steps, key), levels=[Mark(ln_n, "ln N")] if has_ln_n else (),
                    low=0 if key == "prototypes_in_use" else None, **how) for key, title, has_ln_n in PANELS]
    agree = [Curve("views", "one", curve(steps, "views_agree")), Curve("crops", "two", curve(steps, "crops_agree"))]
    drawn.append(curves("Same prototype, share of videos", agree, low=0, **how))
    drawn.append(curves("Learning rate", [Curve("", "three", curve(steps, "lr"))], low=0, **how))
    drawn = "".join(filter(None, drawn))
    return f'<div class="charts">{drawn}</div>' if drawn else '<p class="hint">No step is logged yet.</p>'
