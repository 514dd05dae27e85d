"""Charts as SVG inside a page: curves and bars. Colours come from the page (support/page_assets/page.css), so that
they suit light and dark; what is shown is told apart by dashes, shapes and words too.
"""

import html
import math
from typing import NamedTuple

from support.page import readable

WIDTH, HEIGHT = 380, 244  # of the drawing; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 44, 64, 34, 34  # margins: on the right the names of curves, above those of marks
MOST = 300  # points of a curve
LINE = 13  # px between two names
FEW = 60  # points of a curve that still have room for symbols


class Curve(NamedTuple):
    name: str
    kind: str  # its class in page.css: rgb or one, flow or two, three
    points: list  # of (x, y)


class Mark(NamedTuple):
    """A line across: at a value of x (upright) or y."""
    at: float
    text: str


def ticks(low, high, many=5):
    """Round numbers within low..high, about `many`."""
    step = 10.0 ** math.floor(math.log10((high - low) / many))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= many)
    return [step * k for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def thinned(points, most=MOST):
    """`most` of the points at most, evenly spaced, the first and the last among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def text(value):
    """A value as HTML."""
    return html.escape(readable(str(value)))


def _label(x, y, words, kind="", anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{text(words)}</text>'


def _line(kind, x1, x2, y1, y2):
    return f'<line class="{kind}" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def spread(wanted, low, high):
    """Heights near those wanted, in their order, at least LINE apart, within low..high where there is room."""
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    at = list(wanted)
    for before, i in zip([None, *order], order, strict=False):
        at[i] = max(low if before is None else at[before] + LINE, at[i])
    for after, i in zip([None, *reversed(order)], reversed(order), strict=False):
        at[i] = min(high if after is None else at[after] - LINE, at[i])
    return at


class Axes:
    """The field of a chart: where values lie, and its frame with ticks."""

    def __init__(self, x, y):
        (self.x0, self.x1), (self.y0, self.y1) = x, y

    def x(self, value):
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value):
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def frame(self, name):
        """Grid, ticks and the name of x, as SVG elements."""
        right, foot = WIDTH - RIGHT, HEIGHT - BOTTOM
        parts = [_label((LEFT + right) / 2, HEIGHT - 4, name, anchor="middle")]
        for value in ticks(self.y0, self.y1):
            y = self.y(value)
            parts += [_line("grid", LEFT, right, y, y), _label(LEFT - 6, y + 4, f"{value:g}", anchor="end")]
        parts += [_label(self.x(value), foot + 15, f"{value:g}", anchor="middle") for value in ticks(self.x0, self.x1)]
        return [*parts, _line("axis", LEFT, right, foot, foot)]

    def marks(self, marks):
        """Upright lines at values of x, each with its words beside it."""
        parts = []
        for k, mark in enumerate(marks):
            x = self.x(mark.at)
            parts += [_line("mark", x, x, TOP, HEIGHT - BOTTOM),
                      _label(x - 3, TOP - 4 - LINE * (k % 2), mark.text)]
        return parts


def _symbol(kind, x, y, words):
    """A point that says its value when pointed at: a disc, or a square for the second kind."""
    shape = (f'rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"' if kind in ("flow", "two") else
             f'circle cx="{x:.1f}" cy="{y:.1f}" r="3"')
    return f'<{shape} class="point {kind}"><title>{text(words)}</title></{shape.partition(" ")[0]}>'


def _svg(title, parts):
    return (f'<figure class="chart"><figcaption>{text(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'role="img" aria-label="{text(title)}">{"".join(parts)}</svg></figure>')


def _y_range(every, levels, low):
    """Room for all values; it begins at `low` where that is given and none lies below."""
    values = [y for c in every for _, y in c.points] + [level.at for level in levels]
    least, most = min(values), max(values)
    room = 0.06 * ((most - least) or abs(most) or 1)
    return (low if low is not None and least >= low else least - room), most + room


def curves(title, every, x_range, levels=(), marks=(), low=None, name="epoch"):
    """Curves over x with their names at their ends -> SVG, "" where there are no points. levels: of Mark, values of y;
    marks: values of x. Where points are few each has a symbol that says its value when pointed at."""
    every = [c._replace(points=thinned(c.points)) for c in every if c.points]
    if not every:
        return ""
    axes = Axes(x_range, _y_range(every, levels, low))
    parts = axes.frame(name) + axes.marks(marks)
    parts += [_line("level", LEFT, WIDTH - RIGHT, axes.y(level.at), axes.y(level.at)) for level in levels]
    for c in every:
        at = [(axes.x(x), axes.y(y)) for x, y in c.points]
        parts.append(f'<polyline class="curve {c.kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in at)}"/>')
        if len(at) <= FEW:
            parts += [_symbol(c.kind, *place, f"{c.name} {name} {x:.4g}: {y:.4g}".strip()) for place, (x, y) in
                      zip(at, c.points, strict=True)]
    names = [(level.text, "", level.at) for level in levels] + [(c.name, c.kind, c.points[-1][1]) for c in every]
    heights = spread([axes.y(y) for *_, y in names], TOP, HEIGHT - BOTTOM)
    parts += [_label(WIDTH - RIGHT + 7, y + 4, words, f"name {kind}") for (words, kind, _), y in
              zip(names, heights, strict=True)]
    return _svg(title, parts)


def bars(title, groups, name, marks=()):
    """Counts in bins. groups: [(words, kind, [(left, right, count)])], beside each other in each bin."""
    cells = [cell for *_, own in groups for cell in own]
    axes = Axes((min(a for a, _, _ in cells), max(b for _, b, _ in cells)), (0, 1.08 * max(n for *_, n in cells)))
    parts = axes.frame(name) + axes.marks(marks)
    for k, (words, kind, own) in enumerate(groups):
        for a, b, n in (cell for cell in own if cell[2]):
            width = (axes.x(b) - axes.x(a) - 1) / len(groups)
            parts.append(f'<rect class="bar {kind}" x="{axes.x(a) + k * width:.1f}" y="{axes.y(n):.1f}" '
                         f'width="{width:.1f}" height="{axes.y(0) - axes.y(n):.1f}">'
                         f"<title>{text(f'{words}: {n}, {a:.3f} to {b:.3f}')}</title></rect>")
    return _svg(title, parts)
