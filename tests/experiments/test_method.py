"""The picture of the method: what it says of its assignments is so, and it is small enough for the README."""

import numpy as np
import pytest

from experiments import figures, method

RGB, FLOW = 0, 1


def test_the_captions_are_true():
    action, suit = np.divmod(np.arange(4), 2)
    other_suit = (action[:, None] == action) & (suit[:, None] != suit)  # the same action in the other clothes
    other_action = (action[:, None] != action) & (suit[:, None] == suit)
    own, guided = method.assignments()
    for d in (own, guided):
        assert d.sum(-1) == pytest.approx(1)
    by_action = np.array([[d[view][other_suit].sum() - d[view][other_action].sum() for view in (RGB, FLOW)]
                          for d in (own, guided)])
    assert (np.sign(by_action) == [[-1, 1], [1, 1]]).all()  # RGB alone groups by clothes; the rest by action


def test_slow_flow_is_white():
    uv = np.zeros((2, 1, 2), np.float32)
    uv[0] = [[0.1, 5]]  # px to the right
    still, moving = method.coloured(uv)[0].tolist()
    assert still == [255, 255, 255] and moving == [255, 0, 0]


def test_it_is_drawn_small_and_opaque(tmp_path):
    assert figures.main(["method", "--out", str(tmp_path / "method.svg")]) == 0
    text = (tmp_path / "method.svg").read_text()
    assert len(text.encode()) < 200_000
    assert "fill: #ffffff" in text.split("<g id=", 3)[2]  # behind everything
