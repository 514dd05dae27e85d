"""Charts of a run's page: where values lie, what is thinned out, that names do not cover each other."""

import re

import numpy as np
import pytest

from experiments.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    LINE,
    RIGHT,
    TOP,
    WIDTH,
    Curve,
    Mark,
    bars,
    curves,
    spread,
    thinned,
    ticks,
)


@pytest.mark.parametrize(("low", "high", "expected"), [
    (0, 24, [0, 5, 10, 15, 20]), (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (1.7, 3.1, [2, 2.5, 3]),
    (-0.05, 0.42, [0, 0.1, 0.2, 0.3, 0.4]),
    (0, 500, [0, 100, 200, 300, 400, 500]), (3e-7, 9e-7, [4e-7, 6e-7, 8e-7])])
def test_ticks_are_round(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_thinning_keeps_both_ends():
    points = [(i, i) for i in range(1001)]
    kept = thinned(points, 101)
    assert kept == points[::10] and thinned(points[:50], 101) == points[:50]


def test_names_stay_apart_and_in_their_order():
    assert spread([50, 51, 52], 0, 100) == [50, 50 + LINE, 50 + 2 * LINE]
    assert spread([99, 98], 0, 100) == [100, 100 - LINE]  # the lower edge holds
    assert spread([10, 80], 0, 100) == [10, 80]


def test_values_lie_where_the_axes_say():
    """y from 0 to 10 by the level at 10 and `low`, with 6 % of room above; x from 0 to 4."""
    svg = curves("T <1>", [Curve("a", "rgb", [(0, 0), (2, 5), (4, 10)])], (0, 4), levels=[Mark(10, "ln N")],
                 marks=[Mark(1, "warm-up ends")], low=0)
    assert "T &lt;1&gt;" in svg and "T <1>" not in svg
    places = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]*)"', svg)[1].split()]
    wide, high, foot = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM, HEIGHT - BOTTOM
    assert places == [pytest.approx(p, abs=0.06) for p in (
        (LEFT, foot), (LEFT + wide / 2, foot - high * 5 / 10.6), (LEFT + wide, foot - high * 10 / 10.6))]
    level = re.search(r'class="level" x1="44.0" x2="[\d.]+" y1="([\d.]+)"', svg)[1]
    assert float(level) == pytest.approx(places[2][1], abs=0.06)
    assert float(re.search(r'class="mark" x1="([\d.]+)"', svg)[1]) == pytest.approx(LEFT + wide / 4, abs=0.06)
    assert ">ln N</text>" in svg and ">warm-up ends</text>" in svg and svg.count("<circle") == 3
    assert "<title>a epoch 2: 5</title>" in svg


def test_nothing_to_draw_and_one_point():
    assert curves("T", [Curve("a", "rgb", [])], (0, 4)) == ""
    assert curves("T", [Curve("a", "rgb", [(1, 3.0)]), Curve("b", "flow", [])], (0, 4)).count("polyline") == 1


def test_bars_are_as_high_as_their_counts():
    svg = bars("T", [("a", "one", [(0.0, 1.0, 4), (1.0, 2.0, 0)]), ("b", "two", [(0.0, 1.0, 2), (1.0, 2.0, 1)])], "x")
    heights = np.array([float(h) for h in re.findall(r'class="bar \w+"[^>]*height="([\d.]+)"', svg)])
    assert len(heights) == 3 and heights / heights[0] == pytest.approx([1, 1 / 2, 1 / 4], abs=0.01)
