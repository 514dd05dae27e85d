"""The command of a run that is quick to kill and to continue, and the lines of its log."""

import json
from pathlib import Path

# 5 epochs of 2 steps; saved after 2, 4, ..., logged after 3, 6, 9, 10: a line spans a save
SMALL = ["--arch", "r2plus1d18", "--width", "0.125", "--hidden", "16", "--frames", "4", "--short-crops", "0", "--size",
         "16", "--batch-size", "8", "--epochs", "5", "--warmup-epochs", "1", "--log-every", "3", "--workers", "0"]


def command(tiny, *more):
    return [*tiny.common(), "--prototypes", str(tiny.prototypes), *SMALL, *more]


def log_lines(out):
    return [line for line in map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines()) if "loss" in line]
