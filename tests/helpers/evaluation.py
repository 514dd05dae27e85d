"""evaluate.py on the tiny set, in one process and in two."""

import json
from pathlib import Path

import torch

import evaluate
import model
from support.checkpoints import save_checkpoint

UNTRAINED = ["--checkpoint", "none", "--arch", "r2plus1d18", "--width", "0.125", "--frames", "4", "--size", "16"]


def command(tiny, name, *more):
    return evaluate.evaluate(evaluate.arguments([name, *tiny.common(), "--workers", "0", *more]))


def result(tiny, tmp_path, name, *more):
    assert command(tiny, name, *more, "--json", str(tmp_path / "r.json")) == 0
    return json.loads((tmp_path / "r.json").read_text())


def checkpoint(path, seed=0, **settings):
    settings = {"arch": "r2plus1d18", "width": 0.125, "hidden": 8, "pool": "avg", "method": "goca", "seed": seed,
                "frames": 4, "size": 16, "stride": 1, "flow_header": None, **settings}
    net = model.two_view(settings, torch.eye(4))
    save_checkpoint(path / "checkpoint.pt", {"settings": settings, "step": 1, "model": net.state_dict()})
    return str(path)


def in_two_processes(forked, said, stage, *argv, status=(0, 0), interrupt=0):
    """A command of pretrain.py, evaluate.py or search.py in two processes (see tests/helpers/forked.py) -> what both
    print. said: beginning of the names of files for that."""
    forked("command_in_two", stage=stage, argv=list(map(str, argv)), interrupt=interrupt, said=said, status=status)
    return "".join(Path(f"{said}{rank}").read_text() for rank in (0, 1))
