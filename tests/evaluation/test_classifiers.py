"""Linear probe and fine-tuning: schedules, what changes and what must not, several processes, stopping and going on."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from helpers.evaluation import UNTRAINED, checkpoint, command, in_two_processes, result
from helpers.locks import made_elsewhere
from helpers.training import poisoned

import data
import evaluate
import model
from support import classifiers
from support.checkpoints import load_checkpoint
from support.datasets import read_split
from support.errors import BadInput
from support.evaluation_flags import VIEWS


def test_schedules():
    vicc, released = classifiers.FINETUNE["vicc"], classifiers.LINEAR["released"]
    lr = [classifiers.recipe_rate(e * 7, 7, vicc) for e in (0, 199, 200, 299, 300, 399, 400, 449, 450, 499)]
    assert lr == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    assert [classifiers.recipe_rate(s, 1, released) for s in (0, 50, 100)] == pytest.approx([0.3, 0.15, 0])
    short = classifiers.LINEAR["vicc"]._replace(epochs=10)
    assert [round(classifiers.recipe_rate(e, 1, short), 9) for e in (5, 6, 7, 8)] == [0.1, 0.01, 0.01, 0.001]


def test_backbone_learns_at_its_share_of_the_rate():
    net = model.two_view({"arch": "s3d", "width": 0.125, "hidden": 8, "pool": "avg", "method": "goca", "seed": 0},
                         torch.eye(4))
    recipe = classifiers.FINETUNE["coclr"]
    c = classifiers.Classifier({"rgb": net.backbones["rgb"]}, 128, 3, recipe, frozen=False)
    optimizer = classifiers.classifier_optimizer(c, recipe)
    x = {"rgb": torch.randn(2, 3, 8, 32, 32)}
    classifiers.classifier_step(c(x), torch.tensor([0, 1]), optimizer, 2e-3, "x")
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2e-3, 2e-4])
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in c.parameters()}


TRAIN = ["--epochs", "2", "--batch-size", "5", "--views", "rgb+flow", "--scale", "1", "1.2"]


def test_linear_on_clips_leaves_the_backbone_bit_equal(tiny, tmp_path, monkeypatch):
    run = checkpoint(tmp_path)
    more = ["--checkpoint", run, "--on", "clips", *TRAIN]
    out = result(tiny, tmp_path, "linear", *more, "--out", str(tmp_path / "a"))
    assert out["protocol"]["on"] == "clips" and 0 <= out["results"]["rgb+flow"]["top-1"] <= 100
    after = load_checkpoint(tmp_path / "a" / "linear-split1-rgb+flow.pt")["model"]
    for k, t in load_checkpoint(run)["model"].items():
        if k.startswith("backbones."):
            assert torch.equal(after[k], t), k
    assert after["head.2.weight"].abs().max() > 0.01  # and the linear layer did learn
    monkeypatch.setattr(classifiers.Classifier, "train", torch.nn.Module.train)  # batch norm learns
    with pytest.raises(AssertionError, match="frozen backbone changed"):
        command(tiny, "linear", *more, "--out", str(tmp_path / "b"))


def test_two_processes_train_as_one_does(tiny, forked, tmp_path):
    """Also where one of them was asked to stop on the way. Equal up to the order of sums, without dropout: a batch
    norm over 10 values of 1 x 1 x 1 turns rounding into 2e-4 of a gradient (1e-11 of it in float64), and the next step
    goes on from there; so the update of the backbone is compared, to a tenth.
    """
    more = ["--checkpoint", checkpoint(tmp_path), "--epochs", "1", "--views", "flow", "--scale", "1", "1.2"]
    commands = {"finetune": [*more, "--lr", "1e-4", "--dropout", "0"], "linear": [*more, "--on", "clips"]}
    one = {name: result(tiny, tmp_path, name, *argv, "--batch-size", "10", "--out", str(tmp_path / "one"))
           for name, argv in commands.items()}

    def two(name, **how):
        return in_two_processes(forked, tmp_path / "said", "evaluate", name, *tiny.common(), *commands[name],
                                "--workers", "0", "--batch-size", "5", "--out", tmp_path / "two", "--json",
                                tmp_path / f"{name}.json", **how)

    stopped = two("finetune", interrupt=1, status=(128 + signal.SIGTERM,) * 2)
    assert "saved step 1 of 2; the same command continues" in stopped
    two("finetune")
    two("linear")
    start = load_checkpoint(tmp_path)["model"]
    for name in commands:
        a, b = (load_checkpoint(tmp_path / n / f"{name}-split1-flow.pt") for n in ("one", "two"))
        assert a["step"] == b["step"] == 2
        near = {"rtol": 1e-3, "atol": 1e-4 if name == "finetune" else 1e-5}
        for k in a["model"]:
            torch.testing.assert_close(a["model"][k], b["model"][k], **near)
        if name == "finetune":
            whole = [torch.cat([m[k].flatten() for k in start
                                if k.startswith("backbones.flow.") and k.endswith(("weight", "bias"))])
                     for m in (start, a["model"], b["model"])]
            assert 10 * (whole[1] - whole[2]).norm() < (whole[1] - whole[0]).norm()
        out = json.loads((tmp_path / f"{name}.json").read_text())
        assert out["protocol"]["batch"] == 10 and out["queries"] == one[name]["queries"]
        assert out["predictions"] == one[name]["predictions"]


def test_finetuning_changes_the_backbone_and_continues_with_the_same_numbers(tiny, tmp_path, monkeypatch):
    run = checkpoint(tmp_path)
    more = ["--checkpoint", run, *TRAIN]
    whole = result(tiny, tmp_path, "finetune", *more, "--out", str(tmp_path / "a"))
    one = load_checkpoint(tmp_path / "a" / "finetune-split1-rgb+flow.pt")
    assert not torch.equal(one["model"]["backbones.rgb.net.layers.0.0.weight"],
                           load_checkpoint(run)["model"]["backbones.rgb.net.layers.0.0.weight"])
    augment, steps = data.augment, []

    def signalled(*args):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return augment(*args)
    monkeypatch.setattr(data, "augment", signalled)
    with pytest.raises(SystemExit) as e:
        command(tiny, "finetune", *more, "--out", str(tmp_path / "b"))
    assert e.value.code == 128 + signal.SIGTERM
    resumed = result(tiny, tmp_path, "finetune", *more, "--out", str(tmp_path / "b"))
    assert len(steps) == 8  # 2 epochs of 20 / 5
    two = load_checkpoint(tmp_path / "b" / "finetune-split1-rgb+flow.pt")
    assert two["history"] == one["history"] and [h["epoch"] for h in two["history"]] == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(one["model"].values(), two["model"].values(), strict=True))
    assert resumed["results"] == whole["results"]
    assert json.loads((tmp_path / "b" / "finetune-split1-rgb+flow.json").read_text())["history"] == one["history"]
    with pytest.raises(BadInput, match=r"trained with other settings \(lr 0.1 -> 0.2"):
        command(tiny, "finetune", *more, "--lr", "0.2", "--out", str(tmp_path / "b"))
    probabilities = result(tiny, tmp_path, "finetune", *more, "--out", str(tmp_path / "b"))["predictions"]
    assert probabilities == whole["predictions"] and len(steps) == 8  # done: only tested again
    monkeypatch.setattr(evaluate, "read_split", lambda *args, **k: (
        lambda found: found._replace(classes=found.classes[::-1]))(read_split(*args, **k)))
    with pytest.raises(BadInput, match=r"trained with other settings \(videos and labels \w+ -> \w+\)"):
        command(tiny, "finetune", *more, "--out", str(tmp_path / "b"))


def test_a_second_fine_tuning_of_one_file_at_the_same_time_is_refused(tiny, tmp_path):
    """Of another view or command is another file, and what is done is tested meanwhile, too."""
    out = tmp_path / "a"
    more = ["--checkpoint", checkpoint(tmp_path), "--epochs", "1", "--batch-size", "10", "--scale", "1", "1.2", "--out",
            str(out)]
    out.mkdir()
    with made_elsewhere(out / "finetune-split1-rgb.pt", "evaluate.py"):
        assert command(tiny, "finetune", *more, "--views", "flow") == 0
        with pytest.raises(BadInput, match=r"another evaluate\.py is making .*finetune-split1-rgb\.pt: wait for its"):
            command(tiny, "finetune", *more, "--views", "rgb")
    assert command(tiny, "finetune", *more, "--views", "rgb") == 0
    assert sorted(os.listdir(out)) == [f"finetune-split1-{view}.{end}" for view in ("flow", "rgb")
                                       for end in ("json", "pt")]
    with made_elsewhere(out / "finetune-split1-rgb.pt", "evaluate.py"):
        assert command(tiny, "finetune", *more, "--views", "rgb") == 0


def test_a_bad_step_of_fine_tuning_is_dropped_and_five_in_a_row_end_it(tiny, tmp_path, monkeypatch, capsys):
    """A video whose clip is not finite: the weights before it are kept, and what is saved can be used."""
    more = ["--checkpoint", checkpoint(tmp_path), "--views", "flow", "--scale", "1", "1.2", "--batch-size", "10"]
    poisoned(monkeypatch, {1}, view="flow")
    command(tiny, "finetune", *more, "--epochs", "1", "--out", str(tmp_path / "a"))
    assert "1 steps had a gradient that was not finite and changed nothing" in capsys.readouterr().out
    state = load_checkpoint(tmp_path / "a" / "finetune-split1-flow.pt")
    assert all(w.isfinite().all() for w in state["model"].values()) and state["dropped"] == 1
    monkeypatch.undo()
    poisoned(monkeypatch, set(range(1, 99)), view="flow")
    with pytest.raises(BadInput, match=r"not finite in the last 5 steps before step 6; .*flow.pt is the last good"):
        command(tiny, "finetune", *more, "--epochs", "4", "--out", str(tmp_path / "b"))
    assert load_checkpoint(tmp_path / "b" / "finetune-split1-flow.pt")["step"] == 4


@pytest.mark.parametrize(("recipe", "refused"), [("vicc", True), ("plain", False)])
def test_a_batch_of_one_video_is_refused_where_batch_norm_learns(recipe, refused):
    recipe = classifiers.LINEAR["vicc"]._replace(epochs=1, batch_norm=recipe == "vicc")
    s = SimpleNamespace(seed=0, batch_size=1)
    args = [torch.randn(4, 6)], torch.tensor([0, 1, 0, 1]), 2, recipe, s, torch.device("cpu"), "probe"
    if refused:
        with pytest.raises(BadInput, match="--batch-size 1: batch norm needs the statistics of at least 2 videos"):
            classifiers.fit_features(*args)
    else:
        classifiers.fit_features(*args)
    net = model.two_view({"arch": "s3d", "width": 0.125, "hidden": 8, "pool": "avg", "method": "goca", "seed": 0},
                         torch.eye(4))
    fine = classifiers.Classifier({"rgb": net.backbones["rgb"]}, 128, 3, classifiers.FINETUNE["vicc"], frozen=False)
    with pytest.raises(BadInput, match="--batch-size 1"):
        classifiers.check_batch(fine, 1)
    classifiers.check_batch(fine, 2)


def test_probability_fusion_is_the_mean_of_two_classifiers():
    s = evaluate.arguments(["linear", "--videos", "x", "--flow", "x", *UNTRAINED, "--fusion", "probability", "--views",
                            *VIEWS])
    p = {("rgb",): torch.tensor([[0.9, 0.1]]), ("flow",): torch.tensor([[0.2, 0.8]])}
    asked = []
    out = evaluate.probabilities_by_view(s, lambda views: (asked.append(views), p[views])[1])
    assert sorted(asked) == [("flow",), ("rgb",)]
    torch.testing.assert_close(out["rgb+flow"], torch.tensor([[0.55, 0.45]]))
