"""evaluate.py on the tiny set, in one process and in two."""

import json
import subprocess
import sys

import torch
from helpers.paths import ROOT

import evaluate
import model
from support.checkpoints import save_checkpoint

UNTRAINED = ["--checkpoint", "none", "--arch", "s3d", "--width", "0.125", "--frames", "8", "--size", "32"]


def command(tiny, name, *more):
    return evaluate.evaluate(evaluate.arguments([name, *tiny.common(), "--workers", "0", *more]))


def result(tiny, tmp_path, name, *more):
    assert command(tiny, name, *more, "--json", str(tmp_path / "r.json")) == 0
    return json.loads((tmp_path / "r.json").read_text())


def checkpoint(path, seed=0, **settings):
    settings = {"arch": "s3d", "width": 0.125, "hidden": 8, "pool": "avg", "method": "goca", "seed": seed, "frames": 8,
                "size": 32, "stride": 1, "flow_header": None, **settings}
    net = model.two_view(settings, torch.eye(4))
    save_checkpoint(path / "checkpoint.pt", {"settings": settings, "step": 1, "model": net.state_dict()})
    return str(path)


def in_two_processes(*more, script=ROOT / "evaluate.py", status=0):
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
                          str(script), *more], capture_output=True, text=True)
    assert out.returncode == status, out.stderr
    return out
