"""Features kept and reused, retrieval, clusters and classifiers: each command end to end on the tiny set."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import classify
import data
import evaluate
import features
import model

ROOT = Path(__file__).parents[1]
UNTRAINED = ["--checkpoint", "none", "--arch", "s3d", "--width", "0.125", "--frames", "8", "--size", "32"]


def command(tiny, name, *more):
    return evaluate.evaluate(evaluate.arguments([name, *tiny.common(), "--workers", "0", *more]))


def result(tiny, tmp_path, name, *more):
    assert command(tiny, name, *more, "--json", str(tmp_path / "r.json")) == 0
    return json.loads((tmp_path / "r.json").read_text())


def forbid(monkeypatch):
    """From here on nothing may be extracted."""
    def extract(*args, **kwargs):
        raise AssertionError("features were extracted again")
    monkeypatch.setattr(features, "extract", extract)


def checkpoint(path, seed=0, **settings):
    settings = {"arch": "s3d", "width": 0.125, "hidden": 8, "pool": "avg", "method": "goca", "seed": seed, "frames": 8,
                "size": 32, "stride": 1, "flow_header": None, **settings}
    net = model.two_view(settings, torch.eye(4))
    data.save_checkpoint(path / "checkpoint.pt", {"settings": settings, "step": 1, "model": net.state_dict()})
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("protocol", ["goca", "coclr"])
def test_features_are_the_mean_of_the_views(tiny, protocol):
    s = evaluate.arguments(["retrieval", *tiny.common(), *UNTRAINED, "--workers", "0", "--batch-views", "3",
                            "--protocol", protocol])
    net, settings = features.load_network(s)
    s.stride, s.pool = settings["stride"], "avg"
    found, store = data.read_split("ucf101", tiny.videos, tiny.splits), data.FlowStore(tiny.flow)
    found = found._replace(videos=found.videos[:3])
    f = features.features(net, found, store, s, torch.device("cpu"), "x")
    assert len(f.videos) == 3 and f.left_out == []
    clips = data.TestClips(found.videos, store, protocol=protocol, frames=8, size=32)[1]
    with torch.no_grad():
        each = net.features("flow", data.normalise_flow(clips["flow"]))
    if protocol == "goca":
        each = F.normalize(each, dim=1)
    torch.testing.assert_close(f.values["flow"][1], (each * clips["weight"][:, None]).sum(0), rtol=1e-4, atol=1e-5)


def test_features_are_extracted_once(tiny, tmp_path, monkeypatch):
    more = [*UNTRAINED, "--features", str(tmp_path / "f")]
    assert command(tiny, "features", *more) == 0
    assert len(list((tmp_path / "f").iterdir())) == 2  # train and test; no part is left
    forbid(monkeypatch)
    first = result(tiny, tmp_path, "retrieval", *more)
    assert first["results"] == result(tiny, tmp_path, "retrieval", *more)["results"]
    result(tiny, tmp_path, "cluster", *more, "--runs", "2")
    for other in (["--seed", "1"], ["--protocol", "coclr"], ["--frames", "9"]):  # other weights, views, clips
        with pytest.raises(AssertionError, match="extracted again"):
            command(tiny, "retrieval", *more, *other)


def test_an_interrupted_extraction_goes_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 4)
    whole = result(tiny, tmp_path, "retrieval", *UNTRAINED)
    forward, calls = features.mean_over_views, []

    def stop_at_the_third(*args):
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args)
    monkeypatch.setattr(features, "mean_over_views", stop_at_the_third)
    more = [*UNTRAINED, "--features", str(tmp_path / "f"), "--batch-views", "1000"]
    with pytest.raises(KeyboardInterrupt):
        command(tiny, "retrieval", *more)
    assert len(list((tmp_path / "f").iterdir())) == 2  # the blocks that were done
    resumed = result(tiny, tmp_path, "retrieval", *more)
    assert sum(calls) == 30 + 4  # the third block twice
    assert resumed["results"] == whole["results"] and resumed["neighbours"] == whole["neighbours"]


def in_two_processes(*more, script=ROOT / "evaluate.py", status=0):
    out = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
                          str(script), *more], capture_output=True, text=True)
    assert out.returncode == status, out.stderr
    return out


def test_two_processes_extract_what_one_does(tiny, tmp_path):
    assert features.BLOCK < 20  # so that both have something to do
    one = result(tiny, tmp_path, "retrieval", *UNTRAINED)
    in_two_processes("retrieval", *tiny.common(), *UNTRAINED, "--workers", "0", "--features", str(tmp_path / "f"),
                     "--json", str(tmp_path / "two.json"))
    two = json.loads((tmp_path / "two.json").read_text())
    assert one["results"] == two["results"] and one["neighbours"] == two["neighbours"]
    assert [v for v in (tmp_path / "f").iterdir() if v.name.startswith(".")] == []


def test_the_file_of_features_is_checked(tiny, tmp_path):
    more = [*UNTRAINED, "--features", str(tmp_path / "f")]
    assert command(tiny, "features", *more) == 0
    path = next((tmp_path / "f").glob("*train*"))
    header, arrays = data.load_arrays(path, "features", "x")
    assert arrays["rgb"].shape == (20, 128) and len(arrays["names"]) == len(arrays["labels"]) == 20
    data.save_arrays(path, "features", {**header, "key": "0" * 16}, **arrays)
    with pytest.raises(data.BadInput, match="features of another checkpoint"):
        command(tiny, "retrieval", *more)
    arrays["flow"][3, 5] = np.nan
    data.save_arrays(path, "features", header, **arrays)
    with pytest.raises(data.BadInput, match="features that are not finite"):
        command(tiny, "retrieval", *more)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(data.BadInput, match="damaged or no features file"):
        command(tiny, "retrieval", *more)


def test_weights_that_are_not_finite_are_named(tiny, tmp_path, monkeypatch):
    run = checkpoint(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    next(t for k, t in state["model"].items() if "backbones.flow" in k).fill_(torch.nan)
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(data.BadInput, match="not finite: the weights of"):
        command(tiny, "retrieval", "--checkpoint", run)


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval and clusters
# ---------------------------------------------------------------------------------------------------------------------
def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_fusions_are_the_mean_feature_and_the_sum_of_similarities():
    q, g = ({v: 3 * unit(n, 8, seed=i + n) for i, v in enumerate(model.VIEWS)} for n in (11, 30))
    mean = F.cosine_similarity(*((F.normalize(d["rgb"]) + F.normalize(d["flow"]))[s] for d, s in (
        (q, (slice(None), None)), (g, (None,)))), dim=2)
    both = sum(F.cosine_similarity(q[v][:, None], g[v][None], dim=2) for v in model.VIEWS)
    for fusion, expected in (("average", mean), ("similarity", both / 2)):
        a, b = (features.view_matrix(d, "rgb+flow", "goca", fusion) for d in (q, g))
        torch.testing.assert_close(a @ b.T, expected)


def test_coclr_centres_each_set_by_its_own_mean():
    x = torch.randn(9, 4) + 5
    torch.testing.assert_close(features.prepare(x, "coclr"), F.normalize(x - x.mean(0), dim=1))
    torch.testing.assert_close(features.prepare(x, "goca"), F.normalize(x, dim=1))


@pytest.mark.parametrize("protocol", ["goca", "coclr"])
def test_retrieval_end_to_end(tiny, tmp_path, protocol, capsys):
    out = result(tiny, tmp_path, "retrieval", *UNTRAINED, "--protocol", protocol, "--per-class")
    assert out["protocol"]["protocol"] == protocol and out["protocol"]["method"] == "untrained"
    assert (out["protocol"]["gallery"], out["protocol"]["queries"], out["protocol"]["classes"]) == (20, 10, 10)
    assert set(out["results"]) == {"rgb", "flow", "rgb+flow"}
    for view, r in out["results"].items():
        assert r["R@20"] == 100 and r["R@1 chance"] == pytest.approx(10)
        near = np.array(out["neighbours"][view])
        labels = np.array([g["label"] for g in out["gallery"]])
        query = np.array([q["label"] for q in out["queries"]])
        right = labels[near[:, 0]] == query
        assert near.shape == (10, 10) and r["R@1"] == pytest.approx(100 * right.mean())
        assert [c["R@1"] for c in out["per_class"][view].values()] == [
            100 * right[query == i].mean() for i in range(10)]
    said = capsys.readouterr().out
    assert "R@1" in said and {"goca": "8 frames x 10 clips", "coclr": "a window every 15"}[protocol] in said
    assert all(f"{name:>24}" in said for name in out["classes"])


def perfect(monkeypatch):
    """Features that are the label."""
    def extract(net, videos, store, s, device, what, keep, done=()):
        f = F.one_hot(torch.tensor([v.label for v in videos]), 10).float().numpy()
        for b, at in enumerate(np.array_split(np.arange(len(videos)), -(-len(videos) // features.BLOCK))):
            keep(b, {"rgb": f[at], "flow": f[at], "kept": at, "faults": np.array([], str)})
    monkeypatch.setattr(features, "extract", extract)


def test_a_perfect_representation_scores_100(tiny, monkeypatch, tmp_path):
    """Labels, gallery and queries keep their places through every command."""
    perfect(monkeypatch)
    assert result(tiny, tmp_path, "retrieval", *UNTRAINED)["results"]["rgb+flow"]["R@1"] == 100
    clusters = result(tiny, tmp_path, "cluster", *UNTRAINED, "--runs", "3")["results"]["flow"]
    assert all(clusters[k] == pytest.approx(100) for k in ("Acc", "NMI", "F1", "Acc one-to-one"))
    assert clusters["Acc deviation"] == 0 and clusters["inertia"] == pytest.approx(0, abs=1e-5)
    for recipe in classify.LINEAR:
        linear = result(tiny, tmp_path, "linear", *UNTRAINED, "--recipe", recipe, "--batch-size", "10", "--epochs",
                        "30")
        assert linear["results"]["rgb"]["top-1"] == linear["results"]["rgb+flow"]["top-1"] == 100


def test_several_splits_and_their_mean(tiny, monkeypatch, tmp_path):
    perfect(monkeypatch)
    for kind in ("train", "test"):
        for split in ("01", "02"):
            (tmp_path / f"{kind}list{split}.txt").write_text((tiny.splits / f"{kind}list01.txt").read_text())
    (tmp_path / "classInd.txt").write_text((tiny.splits / "classInd.txt").read_text())
    out = result(tiny, tmp_path, "retrieval", *UNTRAINED, "--splits", str(tmp_path), "--split", "1", "2")
    assert set(out["splits"]) == {"1", "2"} and out["protocol"]["split"] == [1, 2]
    assert out["results"]["rgb"]["R@1"] == 100
    a, b = {"rgb": {"R@1": 20, "R@1 standard error": 3}}, {"rgb": {"R@1": 40, "R@1 standard error": 4}}
    assert evaluate.mean_of_splits([a, b]) == {"rgb": {"R@1": 30, "R@1 standard error": 2.5}}


# ---------------------------------------------------------------------------------------------------------------------
# Linear probe and fine-tuning
# ---------------------------------------------------------------------------------------------------------------------
def test_schedules():
    vicc, released = classify.FINETUNE["vicc"], classify.LINEAR["released"]
    lr = [classify.learning_rate(e * 7, 7, vicc) for e in (0, 199, 200, 299, 300, 399, 400, 449, 450, 499)]
    assert lr == pytest.approx([0.1, 0.1, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])
    assert [classify.learning_rate(s, 1, released) for s in (0, 50, 100)] == pytest.approx([0.3, 0.15, 0])
    short = classify.LINEAR["vicc"]._replace(epochs=10)
    assert [round(classify.learning_rate(e, 1, short), 9) for e in (5, 6, 7, 8)] == [0.1, 0.01, 0.01, 0.001]


def test_backbone_learns_at_its_share_of_the_rate():
    net = model.two_view({"arch": "s3d", "width": 0.125, "hidden": 8, "pool": "avg", "method": "goca", "seed": 0},
                         torch.eye(4))
    recipe = classify.FINETUNE["coclr"]
    c = classify.Classifier({"rgb": net.backbones["rgb"]}, 128, 3, recipe, frozen=False)
    optimizer = classify.make_optimizer(c, recipe)
    x = {"rgb": torch.randn(2, 3, 8, 32, 32)}
    classify.update(c(x), torch.tensor([0, 1]), optimizer, 2e-3, "x")
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([2e-3, 2e-4])
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in c.parameters()}


TRAIN = ["--epochs", "2", "--batch-size", "5", "--views", "rgb+flow", "--scale", "1", "1.2"]


def test_linear_on_clips_leaves_the_backbone_bit_equal(tiny, tmp_path, monkeypatch):
    run = checkpoint(tmp_path)
    more = ["--checkpoint", run, "--on", "clips", *TRAIN]
    out = result(tiny, tmp_path, "linear", *more, "--out", str(tmp_path / "a"))
    assert out["protocol"]["on"] == "clips" and 0 <= out["results"]["rgb+flow"]["top-1"] <= 100
    after = data.load_checkpoint(tmp_path / "a" / "linear-split1-rgb+flow.pt")["model"]
    for k, t in data.load_checkpoint(run)["model"].items():
        if k.startswith("backbones."):
            assert torch.equal(after[k], t), k
    assert after["head.2.weight"].abs().max() > 0.01  # and the linear layer did learn
    monkeypatch.setattr(classify.Classifier, "train", torch.nn.Module.train)  # batch norm learns: the check must see it
    with pytest.raises(AssertionError, match="frozen backbone changed"):
        command(tiny, "linear", *more, "--out", str(tmp_path / "b"))


# Commands one after another in processes that are there already; fine-tuning without dropout, which every process draws
# for itself. Rank 1 gets a signal in step INTERRUPT.
SCRIPT = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
import classify, data, evaluate
join = dist.init_process_group  # once for all commands
dist.init_process_group = lambda kind: dist.is_initialized() or join(kind)
dist.destroy_process_group = lambda: None
classify.FINETUNE["vicc"] = classify.FINETUNE["vicc"]._replace(dropout=0.0)
update, steps = classify.update, []
def signalled(*args):
    steps.append(1)
    if os.environ["RANK"] == "1" and str(len(steps)) == os.environ.get("INTERRUPT"):
        os.kill(os.getpid(), signal.SIGTERM)
    return update(*args)
classify.update = signalled
for argv in " ".join(sys.argv[1:]).split(" THEN "):
    evaluate.evaluate(evaluate.arguments(argv.split()))
"""


def test_two_processes_train_as_one_does(tiny, tmp_path, monkeypatch):
    """Also where one of them was asked to stop on the way. Equal up to the order of sums, dropout left aside: a batch
    norm over 10 values of 1 x 1 x 1 turns rounding into 2e-4 of a gradient (1e-11 of it in float64), and the next step
    goes on from there; so the update of the backbone is compared, to a tenth.
    """
    monkeypatch.setitem(classify.FINETUNE, "vicc", classify.FINETUNE["vicc"]._replace(dropout=0.0))
    (tmp_path / "script.py").write_text(SCRIPT)
    more = ["--checkpoint", checkpoint(tmp_path), "--epochs", "1", "--views", "flow", "--scale", "1", "1.2"]
    commands = {"finetune": [*more, "--lr", "1e-4"], "linear": [*more, "--on", "clips"]}
    one = {name: result(tiny, tmp_path, name, *argv, "--batch-size", "10", "--out", str(tmp_path / "one"))
           for name, argv in commands.items()}
    two = {name: [name, *tiny.common(), *argv, "--workers", "0", "--batch-size", "5", "--out", str(tmp_path / "two"),
                  "--json", str(tmp_path / f"{name}.json")] for name, argv in commands.items()}
    monkeypatch.setenv("INTERRUPT", "1")
    out = in_two_processes(*two["finetune"], script=tmp_path / "script.py", status=1)
    assert "saved step 1 of 2; the same command continues" in out.stdout
    monkeypatch.delenv("INTERRUPT")
    in_two_processes(*two["finetune"], "THEN", *two["linear"], script=tmp_path / "script.py")
    start = data.load_checkpoint(tmp_path)["model"]
    for name in commands:
        a, b = (data.load_checkpoint(tmp_path / n / f"{name}-split1-flow.pt") for n in ("one", "two"))
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
    one = data.load_checkpoint(tmp_path / "a" / "finetune-split1-rgb+flow.pt")
    assert not torch.equal(one["model"]["backbones.rgb.net.layers.0.0.0.weight"],
                           data.load_checkpoint(run)["model"]["backbones.rgb.net.layers.0.0.0.weight"])
    update, steps = classify.update, []

    def signalled(*args):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)
    monkeypatch.setattr(classify, "update", signalled)
    with pytest.raises(SystemExit) as e:
        command(tiny, "finetune", *more, "--out", str(tmp_path / "b"))
    assert e.value.code == 128 + signal.SIGTERM
    resumed = result(tiny, tmp_path, "finetune", *more, "--out", str(tmp_path / "b"))
    assert len(steps) == 8  # 2 epochs of 20 / 5
    two = data.load_checkpoint(tmp_path / "b" / "finetune-split1-rgb+flow.pt")
    assert two["history"] == one["history"] and [h["epoch"] for h in two["history"]] == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(one["model"].values(), two["model"].values(), strict=True))
    assert resumed["results"] == whole["results"]
    assert json.loads((tmp_path / "b" / "finetune-split1-rgb+flow.json").read_text())["history"] == one["history"]
    with pytest.raises(data.BadInput, match=r"trained with other settings \(lr 0.1 -> 0.2"):
        command(tiny, "finetune", *more, "--lr", "0.2", "--out", str(tmp_path / "b"))
    probabilities = result(tiny, tmp_path, "finetune", *more, "--out", str(tmp_path / "b"))["predictions"]
    assert probabilities == whole["predictions"] and len(steps) == 8  # done: only tested again


def test_probability_fusion_is_the_mean_of_two_classifiers():
    s = evaluate.arguments(["linear", "--videos", "x", "--flow", "x", *UNTRAINED, "--fusion", "probability", "--views",
                            *evaluate.VIEWS])
    p = {("rgb",): torch.tensor([[0.9, 0.1]]), ("flow",): torch.tensor([[0.2, 0.8]])}
    asked = []
    out = evaluate.probabilities_by_view(s, lambda views: (asked.append(views), p[views])[1])
    assert sorted(asked) == [("flow",), ("rgb",)]
    torch.testing.assert_close(out["rgb+flow"], torch.tensor([[0.55, 0.45]]))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------
def test_unreadable_videos_are_left_out_and_counted(tiny, tmp_path, capsys):
    store = tmp_path / "flow"
    store.mkdir()
    (store / "header.json").write_text((tiny.flow / "header.json").read_text())
    for p in sorted(tiny.flow.rglob("*.avi"))[1:]:
        (store / p.relative_to(tiny.flow)).parent.mkdir(exist_ok=True)
        (store / p.relative_to(tiny.flow)).symlink_to(p)
    assert command(tiny, "retrieval", *UNTRAINED, "--flow", str(store)) == 0
    out = capsys.readouterr().out
    assert "1 videos were left out" in out and "has no flow of" in out


def test_unreadable_training_videos_are_said(tiny, tmp_path, capsys):
    store = tmp_path / "flow"
    store.mkdir()
    (store / "header.json").write_text((tiny.flow / "header.json").read_text())
    for p in sorted(tiny.flow.rglob("*.avi")):
        (store / p.relative_to(tiny.flow)).parent.mkdir(exist_ok=True)
        (store / p.relative_to(tiny.flow)).write_bytes(p.read_bytes())
    name = data.read_split("ucf101", tiny.videos, tiny.splits).videos[0].name
    (store / f"{name}.avi").write_bytes(b"rubbish")
    more = ["--views", "rgb", "--epochs", "1", "--batch-size", "20", "--out", str(tmp_path / "o"), "--flow", str(store)]
    assert command(tiny, "linear", *UNTRAINED, "--on", "clips", *more) == 0
    assert f"1 training videos could not be read and were replaced by others; one: {store}" in capsys.readouterr().out


def test_classes_that_the_gallery_lacks(tiny, tmp_path):
    for name in ("classInd.txt", "testlist01.txt"):
        (tmp_path / name).write_text((tiny.splits / name).read_text())
    lines = (tiny.splits / "trainlist01.txt").read_text().splitlines()
    (tmp_path / "trainlist01.txt").write_text("\n".join(line for line in lines if "Walk" not in line))
    for more in (["retrieval"], ["linear"], ["finetune", "--out", str(tmp_path / "o")]):
        with pytest.raises(data.BadInput, match=r"1 classes of which no training video can be read \(Walk\)"):
            command(tiny, *more, *UNTRAINED, "--splits", str(tmp_path))


def test_one_video_in_a_class_is_said(tiny, tmp_path, capsys):
    for name in ("classInd.txt", "testlist01.txt"):
        (tmp_path / name).write_text((tiny.splits / name).read_text())
    lines = (tiny.splits / "trainlist01.txt").read_text().splitlines()
    lines.remove(next(line for line in lines if "Walk" in line))
    (tmp_path / "trainlist01.txt").write_text("\n".join(lines))
    assert command(tiny, "retrieval", *UNTRAINED, "--splits", str(tmp_path)) == 0
    assert "1 classes have one training video only: Walk" in capsys.readouterr().out


def test_bad_input_gets_a_sentence(tiny, tmp_path):
    checkpoint(tmp_path, flow_header={"kind": "flow", "short_side": 1})
    for words, more in {
        "doesn't exist; pretrain.py writes it": ["--checkpoint", str(tmp_path / "x.pt")],
        "trained with --arch s3d, not r2plus1d18": ["--checkpoint", str(tmp_path), "--arch", "r2plus1d18"],
        "other settings than the checkpoint's .*short_side: 1 in training": ["--checkpoint", str(tmp_path)],
        "is no flow store": ["--checkpoint", "none", "--flow", str(tmp_path)],
        "so there is nothing to test on": ["--checkpoint", "none", "--dataset", "folder"],
        "folder has one split; leave the flag out": ["--checkpoint", "none", "--dataset", "folder", "--split", "2"],
        "lacks trainlist03.txt": ["--checkpoint", "none", "--split", "3"],
        "names a split twice": ["--checkpoint", "none", "--split", "1", "1"],
        "--batch-views 0: must be above 0": ["--checkpoint", "none", "--batch-views", "0"],
    }.items():
        with pytest.raises(data.BadInput, match=words):
            command(tiny, "retrieval", *(UNTRAINED[2:] if "none" in more else []), *more)
    with pytest.raises(data.BadInput, match="--out is missing"):
        command(tiny, "finetune", *UNTRAINED)
    with pytest.raises(data.BadInput, match=r"--batch-size 50 x 1 process.* is more than the 20 videos"):
        command(tiny, "linear", *UNTRAINED, "--batch-size", "50")
    with pytest.raises(data.BadInput, match=r"loss of .* is no longer finite; try a smaller --lr"):
        command(tiny, "linear", *UNTRAINED, "--batch-size", "10", "--lr", "1e38")
    (tmp_path / "checkpoint.pt").write_bytes(b"rubbish")
    with pytest.raises(data.BadInput, match="damaged or no checkpoint"):
        command(tiny, "retrieval", "--checkpoint", str(tmp_path))
