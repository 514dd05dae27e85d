"""The method in one picture, after the paper's Fig. 2: `python -m experiments.figures method --out docs/method.svg`.

Films, flow and assignments in it are computed: four generated films (two actions, each in two suits), their TV-L1 flow,
and what goca.py assigns to made-up scores in which RGB tells the suits apart, and flow, more clearly, the actions.
"""

import cv2
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Polygon, Rectangle

import goca
import tvl1
from experiments import puppets
from support.flow_info import colours

RGB, FLOW, INK = "#B84A0A", "#0067A6", "#1F2328"
WIDTH, HEIGHT = 11.6, 7.0  # of the axes, in inches
LANES = ("RGB", RGB, 4.8, 1), ("flow", FLOW, 1.62, -1)  # each view's colour, the middle of its lane, its outer side
ROW = 0.52  # height of a video in a lane
FILMS = ("Kick", 0), ("Kick", 1), ("WaveBoth", 0), ("WaveBoth", 1)  # action, suit


# ---------------------------------------------------------------------------------------------------------------------
# Films, flow, assignments
# ---------------------------------------------------------------------------------------------------------------------
def films(size=112, seed=2):
    """Two moments of each film -> RGB and its flow in colours, both uint8 [4, 2, size / 2, size / 2, 3]."""
    def halved(image):
        return cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)

    rgb, flow, moments = [], [], [3, 11]
    for action, suit in FILMS:
        person, rng = (np.random.default_rng([seed, suit, k]) for k in (0, 1))  # a suit keeps its background
        film = np.stack(puppets.render(action, size, max(moments) + 2, 25, puppets.subject(person), rng))
        grey = np.stack([cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in film])
        pairs = torch.from_numpy(np.stack([grey[t:t + 2] for t in moments]))  # [2, 2, size, size]
        rgb.append([halved(film[t])[..., ::-1] for t in moments])
        flow.append([halved(coloured(uv.numpy())) for uv in tvl1.flow(pairs)[:, 0]])
    return np.array(rgb), np.array(flow)


def coloured(uv, rest=0.3, top=2.2):
    """Flow [2, H, W] in px -> uint8 RGB [H, W, 3], white where it is slower than `rest`, full colour from `top` on."""
    moving = np.where(np.linalg.norm(uv, axis=0) < rest, 0, uv)
    return colours(moving.transpose(1, 2, 0), top)[..., ::-1]


def assignments(lambda1=0.02, lambda2=0.03):
    """Of made-up scores -> D' (Eq. 5) and D (Eqs. 6, 7), each [2 views, 4 videos, 4 prototypes]."""
    action, suit = np.divmod(np.arange(4), 2)  # of a video, and of the prototype that stands for it
    same_action, same_suit = action[:, None] == action, suit[:, None] == suit
    scores = np.stack([0.035 * same_suit + 0.006 * same_action, 0.07 * same_action + 0.006 * same_suit])
    scores = torch.from_numpy(scores)
    own = goca.assign(scores, lambda1)
    guided = goca.guided_assign(scores[:, None], lambda1, lambda2)[:, 0]
    return own.exp().numpy(), guided.exp().numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Drawing: every place is the centre (x, y) of a thing, in inches
# ---------------------------------------------------------------------------------------------------------------------
def pictures(axes, grid, x, y, colour):
    """A grid of pictures [rows, columns, H, W, 3], a row for each video."""
    rows, columns = grid.shape[:2]
    for (r, c), left, top in (((r, c), x + (c - columns / 2) * ROW, y + (rows / 2 - r) * ROW)
                              for r in range(rows) for c in range(columns)):
        place = left + 0.02, left + ROW - 0.02, top - ROW + 0.02, top - 0.02
        axes.imshow(grid[r, c], extent=place, interpolation="none", zorder=2)
        axes.add_patch(Rectangle(place[::2], ROW - 0.04, ROW - 0.04, fill=False, ec=colour, lw=0.8, zorder=3))


def matrix(axes, d, x, y, colour, width=1.0):
    """An assignment [videos, prototypes] as shades."""
    rows, columns = d.shape
    shades = LinearSegmentedColormap.from_list("", ["#FFFFFF", colour])
    for (r, c), share in np.ndenumerate(d):
        at = x + (c / columns - 0.5) * width, y + (rows / 2 - r - 1) * ROW
        axes.add_patch(Rectangle(at, width / columns, ROW, fc=shades(share / d.max()), ec="#D0D7DE", lw=0.6, zorder=2))
    axes.add_patch(Rectangle((x - width / 2, y - rows * ROW / 2), width, rows * ROW, fill=False, ec=colour, lw=1.6,
                             zorder=3))


def arrow(axes, start, end, colour=INK, width=1.4, bend=0.0):
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9 + 2.5 * width, lw=width, color=colour,
                                   connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0, zorder=5))


def write(axes, x, y, text, colour=INK, size=11, **more):
    axes.text(x, y, text, **{"ha": "center", "va": "center", "color": colour, "fontsize": size, "linespacing": 1.45,
                             "zorder": 6, **more})


def box(axes, x, y, width, height, text, colour, size=11):
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, fc="white", ec=colour, lw=1.5,
                                  boxstyle="round,pad=0,rounding_size=0.09", zorder=2))
    write(axes, x, y, text, colour, size)


def sphere(axes, x, y, radius=0.36, points=8):
    """The prototypes: points spread evenly over a sphere."""
    axes.add_patch(Circle((x, y), radius, fc="white", ec=INK, lw=1.3, zorder=2))
    for k in range(points):
        a = 2 * np.pi * k / points
        axes.add_patch(Circle((x + radius * np.cos(a), y + radius * np.sin(a)), 0.055, fc=INK, zorder=3))


AT = {"clips": 1.35, "net": 2.75, "head": 3.85, "s": 5.1, "own": 6.65, "guided": 9.1, "loss": 10.82}  # x of the columns


def lane(axes, name, colour, y, side, grid, own, guided, groups):
    """One view from its videos to its loss. side: 1 where the way around D' leads above, -1 below."""
    write(axes, 0.25, y, name, colour, 13, rotation=90, weight="bold")
    for k, (action, _) in enumerate(FILMS):
        write(axes, 0.76, y + (1.5 - k) * ROW, action.removesuffix("Both").lower(), size=10, ha="right")
    pictures(axes, grid, AT["clips"], y, colour)
    arrow(axes, (AT["clips"] + 0.57, y), (AT["net"] - 0.5, y), colour)
    corners = [(AT["net"] + dx, y + dy) for dx, dy in ((-0.44, -0.75), (0.4, -0.45), (0.4, 0.45), (-0.44, 0.75))]
    axes.add_patch(Polygon(corners, fc="white", ec=colour, lw=1.5, zorder=2))
    write(axes, AT["net"] - 0.02, y, "S3D or\nR(2+1)D", colour, 10.5)
    arrow(axes, (AT["net"] + 0.45, y), (AT["head"] - 0.29, y), colour)
    arrow(axes, (AT["head"] + 0.25, y), (AT["s"] - 0.6, y), colour)
    box(axes, AT["s"], y, 1.1, 0.7, "$S = F\\,P^T$", colour, 12)
    arrow(axes, (AT["s"] + 0.6, y), (AT["own"] - 0.55, y), colour)
    matrix(axes, own, AT["own"], y, colour)
    # S itself goes around D'
    around = y + side * (2 * ROW + 0.28)
    axes.plot([AT["s"]] * 2 + [AT["guided"]], [y + side * 0.35, around, around], color=colour, lw=1.4, zorder=1)
    arrow(axes, (AT["guided"], around), (AT["guided"], y + side * (2 * ROW + 0.04)), colour)
    write(axes, (AT["own"] + AT["guided"]) / 2, around + side * 0.13, "its own scores $S$", colour, 10.5)
    matrix(axes, guided, AT["guided"], y, colour)
    for x, text in zip((AT["own"], AT["guided"]), groups, strict=True):
        write(axes, x, y - side * (2 * ROW + 0.16), text, colour, 10.5)
    arrow(axes, (AT["guided"] + 0.55, y), (AT["loss"] - 0.77, y), colour)
    box(axes, AT["loss"], y, 1.46, 1.3, "each crop's $D$\nis predicted by\nthe other crops", colour, 10.5)


def draw():
    """The whole picture -> a figure of matplotlib."""
    figure = plt.figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    groups = ("grouped by clothes", "now grouped by action"), ("grouped by action", "grouped by action")
    for view, grid, own, guided, words in zip(LANES, films(), *assignments(), groups, strict=True):
        lane(axes, *view, grid, own, guided, words)
    (*_, top, _), (*_, bottom, _) = LANES
    middle = (top + bottom) / 2
    box(axes, AT["head"], middle, 0.46, top - bottom + 1.5, "", INK)
    write(axes, AT["head"], middle, "shared projection head", size=11.5, rotation=90)
    sphere(axes, AT["s"], middle)
    write(axes, AT["s"], middle, "$P$", size=13)
    write(axes, AT["s"] + 0.52, middle, "prototypes,\nfixed (Eq. 11)", size=10.5, ha="left")
    for y in (top, bottom):
        arrow(axes, (AT["s"], middle + (0.46 if y > middle else -0.46)), (AT["s"], y - (0.4 if y > middle else -0.4)))
    for colour, start, end in ((RGB, top, bottom), (FLOW, bottom, top)):  # the priors
        arrow(axes, (AT["own"] + 0.54, start), (AT["guided"] - 0.54, end), colour, 3.2)
    prior = "each view's $D'$ is the prior of the\nother view's $D$, with weight $\\lambda_2$"
    write(axes, AT["guided"] - 0.6, middle, prior, ha="left")
    heads = {"clips": "videos,\ntwo crops each", "net": "backbones", "s": "similarities to\nthe prototypes",
             "own": "assignment $D'$\nby itself: Eq. 5", "guided": "guided assignment $D$:\nEqs. 6, 7, 10",
             "loss": "loss:\nEqs. 12, 13"}
    for column, text in heads.items():
        write(axes, AT[column], HEIGHT - 0.33, text, size=11.5)
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    axes.axis("off")
    return figure
