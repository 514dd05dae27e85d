"""A page of films that opens by double click: one index.html with its scripts, styles and features, and previews/.

The page of a collection (search.py) and the page of a run (experiments/report.py) are made of the same pieces: films
that play, the nearest of each by every view, groups, a map. What the page does is in page_assets/: films.js (a film,
its nearest, the grid), map.js, page.js (tabs and panel).

The page computes similarities itself. Features are embedded with 16 bits, their mean taken off first: those of a
network with ReLU share one large direction, and rounding that would hide what differs. x_i = c_i + m, c_i ~ s_i q_i:

    x_i . x_j = c_i . c_j + (c_i . m + m . m / 2) + (c_j . m + m . m / 2)  ~  s_i s_j (q_i . q_j) + o_i + o_j

which is off by at most (s_i |c_j|_1 + s_j |c_i|_1) / 2 and a rounding of float32.
"""

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.files import atomic
from support.previews import FRAMES, Strip

ASSETS = Path(__file__).with_name("page_assets")
SCRIPTS = ("films.js", "map.js", "page.js")
LEVELS = 2**15 - 1  # of 16 bits


class Item(NamedTuple):
    """A film, or a piece of one."""

    name: str
    path: str = ""
    start_s: float = 0.0
    end_s: float | None = None  # None: a whole film
    strip: Strip | None = None  # its preview, in the folder previews/ beside the page
    missing: str = ""  # why it can't be read any more
    label: str = ""  # its class, where there are classes: neighbours are then marked right or wrong


class Group(NamedTuple):
    title: str
    members: list  # of places in the items, most typical first
    note: str = ""  # such as how tight it is


class Section(NamedTuple):
    """A tab before those of the films. html is trusted: escape what is not, and use `film` and `nearest` for films."""

    title: str
    html: str


def film(item, mark="", note=""):
    """HTML of one film that plays. item: its place in the items. mark: "right", "wrong" or none. note: a line below."""
    note = html.escape(readable(note))
    return f'<span data-film="{item:d}" data-mark="{html.escape(mark)}" data-note="{note}"></span>'


def nearest(item, view, k):
    """HTML of the k nearest films of an item by a view, which the page computes."""
    return f'<span data-nearest="{item:d}" data-view="{html.escape(view)}" data-k="{k:d}"></span>'


def readable(name):
    """A name as text: what is no Unicode, as in file names, is shown as \\udcff."""
    return name.encode(errors="backslashreplace").decode()


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def pack(features):
    """Unit features [n, D] -> bytes: float32 s [n], float32 o [n], int16 q [n, D], little-endian."""
    x = np.asarray(features, dtype=np.float64)
    mean = x.mean(0)
    c = x - mean
    scale = (np.abs(c).max(1) / LEVELS).astype("<f4")
    q = np.rint(c / np.where(scale > 0, scale, 1)[:, None]).clip(-LEVELS, LEVELS).astype("<i2")
    offset = (c @ mean + mean @ mean / 2).astype("<f4")
    return scale.tobytes() + offset.tobytes() + q.tobytes()


def embedded_json(value):
    """JSON that can't end the <script> element that holds it."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _film(item):
    return {"name": readable(item.name), "path": readable(item.path), "start": item.start_s, "end": item.end_s,
            "strip": item.strip and list(item.strip), "missing": readable(item.missing), "label": readable(item.label)}


def _check(items, features, groups, maps, gallery):
    n = len(items)
    for what, by_view, width in (("features", features, None), ("maps", maps, 2)):
        for view, x in by_view.items():
            if x.ndim != 2 or len(x) != n or (width and x.shape[1] != width) or not np.isfinite(x).all():
                raise ValueError(f"{what}[{view!r}] must be finite numbers [{n}, {width or 'D'}], not {x.shape}")
    if lacking := [view for view in (*groups, *maps) if view not in features]:
        raise ValueError(f"groups and maps are of the views {', '.join(features) or 'none'}, not {lacking[0]!r}")
    if any(not 0 <= i < n for each in groups.values() for group in each for i in group.members):
        raise ValueError(f"members of groups are places in the {n} items")
    if gallery is not None and len(gallery) != n:
        raise ValueError(f"gallery must say of each of {n} items whether it may be an answer, not of {len(gallery)}")


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------
def write_page(out, *, title, items, features=None, groups=None, maps=None, notes=(), sections=(), gallery=None,
               reload_s=None):
    """Write OUT/index.html; previews lie in OUT/previews already (support/previews.py). Returns its path.

    items: of Item. features: {view: unit rows [n, D]}, by inner products of which films are near. groups:
    {view: [Group]}. maps: {view: places [n, 2] in 0..1}. notes: lines on where all this is from. sections: of Section.
    gallery: bool [n], the items that may be answers; None: all. reload_s: seconds after which the page reloads itself.
    Raises BadInput where it can't be written.
    """
    features, groups, maps = features or {}, groups or {}, maps or {}
    _check(items, features, groups, maps, gallery)
    data = {"films": [_film(item) for item in items], "frames": FRAMES, "views": list(features), "reload": reload_s,
            "groups": {view: [{"title": g.title, "note": g.note, "members": [int(i) for i in g.members]} for g in each]
                       for view, each in groups.items()},
            "maps": {view: np.round(x, 4).tolist() for view, x in maps.items()},
            "gallery": None if gallery is None else [bool(g) for g in gallery]}
    script = "\n".join((ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    parts = {"title": html.escape(readable(title)), "style": (ASSETS / "page.css").read_text(encoding="utf-8"),
             "script": script, "digest": digest, "data": embedded_json(data),
             "notes": "".join(f"<li>{html.escape(readable(note))}</li>" for note in notes),
             "sections": "".join(f'<section class="tab" data-title="{html.escape(s.title)}" hidden>{s.html}</section>'
                                 for s in sections),
             "features": "".join(f'<script type="text/plain" id="features-{k}">'
                                 f"{base64.b64encode(pack(x)).decode()}</script>\n"
                                 for k, x in enumerate(features.values()))}
    template = (ASSETS / "page.html").read_text(encoding="utf-8")
    page = re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)
    with atomic(Path(out) / "index.html") as tmp:
        tmp.write_text(page, encoding="utf-8")
    return Path(out) / "index.html"
