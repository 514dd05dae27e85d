"""Small runs of pretrain.py in this process."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.small_runs import command

import data
import pretrain
from support.checkpoints import load_checkpoint


def train(tiny, out, *more):
    return pretrain.train(pretrain.arguments(command(tiny, "--out", str(out), *more)))


class Reached(Exception):
    """What a run had made when it came to its batches."""


def made(tiny, tmp_path, monkeypatch, *more, world=1):
    """What pretrain.py makes of its arguments -> TrainClips, EpochBatches, optimizer, net, the first step."""
    seen = SimpleNamespace()

    def run(process, net, optimizer, statistics, clips, batches, *args, start, **kwargs):
        seen.net, seen.optimizer, seen.clips, seen.batches, seen.start = net, optimizer, clips, batches, start
        raise Reached

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "Run", run)
        s = pretrain.arguments(command(tiny, "--out", str(tmp_path / "run"), *more))
        with pytest.raises(Reached):
            pretrain.train_in((torch.device("cpu"), 0, world), s)
    return seen


def settings(**k):
    s = pretrain.arguments(["--videos", "v", "--flow", "f", "--prototypes", "p", "--out", "o"])
    return type(s)(**{**vars(s), **k})


def fake_clips(m):
    torch.manual_seed(1)
    return [{"rgb": torch.randn(m, v, 3, 8, 32, 32), "flow": torch.randn(m, v, 2, 8, 32, 32)} for v in (2, 1)]


SMALL = ["--arch", "r2plus1d18", "--width", "0.125", "--hidden", "16", "--frames", "4", "--short-frames", "4",
         "--short-crops", "1", "--size", "16", "--batch-size", "10", "--epochs", "2", "--warmup-epochs", "1",
         "--log-every", "1", "--workers", "0"]
S3D = ["--arch", "s3d", "--frames", "8", "--short-frames", "8", "--size", "32"]  # the smallest clips that it takes


def run(tiny, out, *more):
    """Train in this process -> exit status."""
    return pretrain.train(pretrain.arguments([*tiny.common(), "--prototypes", str(tiny.prototypes), "--out", str(out),
                                              *SMALL, *more]))


def log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def weights(out):
    return load_checkpoint(out)["model"]


def poisoned(monkeypatch, steps, view="rgb"):
    """Let the clips of some steps (from 0) be NaN."""
    original, count = data.augment, iter(range(1000))

    def augment(batch, device):
        clips = original(batch, device)
        if next(count) in steps:
            clips[0][view].fill_(float("nan"))
        return clips

    monkeypatch.setattr(data, "augment", augment)
