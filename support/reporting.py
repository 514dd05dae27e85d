"""What evaluation prints: the protocol in words, tables by view and by class, what was skipped."""

import math

from support.cli import say


def protocol_in_words(p):
    """The line above a table: what its numbers depend on. The whole protocol is in the file of --json."""
    counts = ", ".join(f"{p[k]} {k}" for k in ("gallery", "queries", "videos", "train", "test", "classes") if k in p)
    network = f"{p['arch']} width {p['width']:g}" + (f", step {p['step']}" if p["step"] else "")
    parts = [f"{p['command']}, protocol {p['protocol']}, {p['dataset']} split {p['split']}", counts,
             f"{p['method']} ({network})", f"{p['views']}, {p['size']} px", p["feature"],
             f"rgb+flow: {p['fusion of rgb+flow']}" if "fusion of rgb+flow" in p else "",
             f"recipe {p['recipe']}, {p['epochs']} epochs" if "recipe" in p else ""]
    return "; ".join(filter(None, parts))


def print_skipped(lines):
    """Print what was listed and could not be evaluated."""
    for line in lines[:10]:
        say(f"skipped: {line}")
    if lines:
        say(f"{len(lines)} videos were skipped in this evaluation; the numbers are not those of the whole data "
              f"set. To try them again once mended, remove the file of features named above, if one is")


def mean_of_splits(each):
    """Results of several splits -> the mean of what all have (R@50 needs a gallery of 50); standard errors add as those
    of independent test sets."""
    return {view: {k: math.sqrt(sum(r[view][k]**2 for r in each)) / len(each) if k.endswith("standard error") else
                   sum(r[view][k] for r in each) / len(each)
                   for k in first if all(k in r[view] for r in each)} for view, first in each[0].items()}


def print_results(results):
    """Print each view's numbers, with their standard error or deviation, and chance below."""
    first = next(iter(results.values()))
    names = [k for k in first if not k.endswith(("standard error", "chance", "deviation"))]
    say(f"{'view':>10}" + "".join(f"{k:>16}" for k in names))
    for view, r in results.items():
        error = {k: r.get(f"{k} standard error", r.get(f"{k} deviation")) for k in names}
        say(f"{view:>10}" + "".join(f"{r[k]:10.1f} ± {error[k]:<3.1f}" if error[k] is not None else f"{r[k]:16,}"
                                      for k in names))
    if f"{names[0]} chance" in first:
        say(f"{'chance':>10}" + "".join(f"{first[f'{k} chance']:10.1f}      " for k in names))


def print_classes(by_class):
    """Print the numbers of each class by view."""
    views = list(by_class)
    for name, row in by_class[views[0]].items():
        cells = (f"{view} " + " ".join(f"{k} {x:.1f}" for k, x in by_class[view][name].items() if k != "videos")
                 for view in views)
        say(f"{name:>24} {row['videos']:>5} videos   " + "   ".join(cells))
