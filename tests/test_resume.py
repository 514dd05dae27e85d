"""Runs that are killed, in several processes or one, on a full disk, and end as if nothing had been."""

import data
import pytest

# 5 epochs of 2 steps; saved after 2, 4, ..., logged after 3, 6, 9, 10: a line spans a save
SMALL = ["--width", "0.125", "--hidden", "16", "--frames", "8", "--short-frames", "8", "--short-crops", "0", "--size",
         "32", "--batch-size", "8", "--epochs", "5", "--warmup-epochs", "1", "--log-every", "3", "--workers", "0"]


def command(tiny, *more):
    return [*tiny.common(), "--prototypes", str(tiny.prototypes), *SMALL, *more]


def test_killed_at_20_random_points_a_run_ends_in_the_same_bits(tiny, forked, tmp_path):
    """SIGKILL, half at any time and half at named moments of a step and of saving; weights, optimizer and log equal."""
    forked("kills", argv=command(tiny), root=tmp_path, count=20, seed=0)
