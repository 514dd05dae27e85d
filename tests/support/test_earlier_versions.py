"""Files that commit 2702013 wrote still load, and mean the same: tests/fixtures/2702013, a tiny S3D on generated films.

The stores, the index and the prototypes are whole; run/ is a run of 4 steps that was stopped after 2, its log goes to
the end; features, retrieval.json and export.pt are of those 2 steps; fine/ is one epoch of fine-tuning.
"""

import json
import shutil

import pytest
import torch
from helpers.paths import ROOT

import data
import evaluate
import pretrain
from support import features
from support.checkpoints import load_checkpoint
from support.features import load_network
from support.stores import FlowStore, RgbStore
from support.video_index import Index

FIXTURE = ROOT / "tests" / "fixtures" / "2702013"


@pytest.fixture
def old(tmp_path):
    """A copy, with empty files where the videos were."""
    root = tmp_path / "old"
    shutil.copytree(FIXTURE, root)
    for flow in (root / "flow").rglob("*.avi"):
        path = root / "videos" / flow.relative_to(root / "flow")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def common(root):
    return ["--dataset", "ucf101", "--videos", str(root / "videos"), "--splits", str(root / "splits"), "--flow",
            str(root / "flow")]


def test_a_run_goes_on_as_it_would_have_gone_on(old):
    """From the checkpoint, the stores and the prototypes: the losses of its own last two steps, to rounding."""
    settings = load_checkpoint(old / "run")["settings"]
    flags = [x for k in ("arch", "width", "hidden", "frames", "short_crops", "size", "batch_size", "epochs",
                         "warmup_epochs", "log_every", "workers")
             for x in (f"--{k.replace('_', '-')}", str(settings[k]))]
    lines = [json.loads(line) for line in (old / "run" / "log.jsonl").read_text().splitlines()]
    expected = [line["loss"] for line in lines if "loss" in line and line["step"] > 2]
    assert pretrain.train(pretrain.arguments([
        *common(old), "--rgb", str(old / "rgb"), "--prototypes", str(old / "prototypes.npz"), "--out",
        str(old / "run"), *flags])) == 0
    lines = [json.loads(line) for line in (old / "run" / "log.jsonl").read_text().splitlines()]
    now = [line["loss"] for line in lines if "loss" in line and line["step"] > 2]
    assert now == pytest.approx(expected, rel=2e-3)


def test_features_are_found_and_retrieve_the_same(old, monkeypatch):
    monkeypatch.setattr(features, "extract_blocks", lambda *args, **kwargs: pytest.fail("extracted anew"))
    before = json.loads((old / "retrieval.json").read_text())
    assert evaluate.evaluate(evaluate.arguments([
        "retrieval", "--checkpoint", str(old / "run"), *common(old), "--json", str(old / "now.json")])) == 0
    now = json.loads((old / "now.json").read_text())
    assert now["results"] == before["results"] and now["neighbours"] == before["neighbours"]


def test_an_export_holds_the_networks_of_its_run(old):
    nets = [load_network(evaluate.arguments(["features", *which, *common(old)]))[0].backbones.state_dict()
            for which in (["--checkpoint", str(old / "run")], ["--weights", str(old / "export.pt")])]
    assert nets[0].keys() == nets[1].keys()
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])


def test_fine_tuning_that_was_done_is_not_done_again(old, monkeypatch):
    monkeypatch.setattr(data, "augment", lambda *args: pytest.fail("trained anew"))
    before = (old / "fine" / "finetune-split1-rgb.pt").read_bytes()
    evaluated = []
    monkeypatch.setattr(evaluate, "predict_clips", lambda classifier, test, *args: (
        evaluated.append(classifier), (torch.eye(10), {}))[1])
    assert evaluate.evaluate(evaluate.arguments([
        "finetune", "--checkpoint", str(old / "run"), *common(old), "--views", "rgb", "--epochs", "1", "--batch-size",
        "5", "--out", str(old / "fine")])) == 0
    assert len(evaluated) == 1 and (old / "fine" / "finetune-split1-rgb.pt").read_bytes() == before


def test_stores_and_index(old):
    assert len(Index.load(old / "index.npz").entries) == 20
    for store, frames in ((FlowStore(old / "flow"), 9), (RgbStore(old / "rgb"), 10)):
        for path in store.root.rglob("*.avi"):
            reader = store.open(str(path.relative_to(store.root))[:-4])
            reader.check(whole=True)
            assert len(reader) == frames
