"""Retrieval, clusters and classifiers: each command end to end on the tiny set; bad input."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.evaluation import UNTRAINED, checkpoint, command, in_two_processes, result

import evaluate
import model
from support import features
from support.checkpoints import save_checkpoint
from support.classifiers import LINEAR, new_classifier
from support.datasets import read_split
from support.errors import BadInput
from support.reporting import mean_of_splits


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
    """The numbers against the neighbours; those against the features: test_features.py."""
    out = result(tiny, tmp_path, "retrieval", *UNTRAINED, "--protocol", protocol, "--per-class")
    assert out["protocol"]["protocol"] == protocol and out["protocol"]["method"] == "untrained"
    assert (out["protocol"]["gallery"], out["protocol"]["queries"], out["protocol"]["classes"]) == (20, 10, 10)
    assert set(out["results"]) == {"rgb", "flow", "rgb+flow"}
    for view, r in out["results"].items():
        assert r["R@1 chance"] == pytest.approx(10) and "R@50" not in r  # of a gallery of 20
        near = np.array(out["neighbours"][view])
        labels = np.array([g["label"] for g in out["gallery"]])
        query = np.array([q["label"] for q in out["queries"]])
        right = labels[near[:, 0]] == query
        assert near.shape == (10, 10) and r["R@1"] == pytest.approx(100 * right.mean())
        assert [c["R@1"] for c in out["per_class"][view].values()] == [
            100 * right[query == i].mean() for i in range(10)]
    said = capsys.readouterr().out
    assert "R@1" in said and {"goca": "4 frames x 10 clips", "coclr": "a window every 15"}[protocol] in said
    assert all(f"{name:>24}" in said for name in out["classes"])


def perfect(monkeypatch):
    """Features that are the label."""
    def extract(net, videos, store, s, device, what, keep, done=(), rgb=None):
        f = F.one_hot(torch.tensor([v.label for v in videos]), 10).float().numpy()
        for b, at in enumerate(np.array_split(np.arange(len(videos)), -(-len(videos) // features.BLOCK))):
            keep(b, {"rgb": f[at], "flow": f[at], "kept": at, "faults": np.array([], str)})
    monkeypatch.setattr(features, "extract_blocks", extract)


def test_a_perfect_representation_scores_100(tiny, monkeypatch, tmp_path):
    """Labels, gallery and queries keep their places through every command."""
    perfect(monkeypatch)
    assert result(tiny, tmp_path, "retrieval", *UNTRAINED)["results"]["rgb+flow"]["R@1"] == 100
    clusters = result(tiny, tmp_path, "cluster", *UNTRAINED, "--runs", "3")["results"]["flow"]
    assert all(clusters[k] == pytest.approx(100) for k in ("Acc", "NMI", "F1", "Acc one-to-one"))
    assert clusters["Acc deviation"] == 0 and clusters["inertia"] == pytest.approx(0, abs=1e-5)
    for recipe in LINEAR:
        linear = result(tiny, tmp_path, "linear", *UNTRAINED, "--recipe", recipe, "--batch-size", "10", "--epochs",
                        "30")
        assert linear["results"]["rgb"]["top-1"] == linear["results"]["rgb+flow"]["top-1"] == 100


def relaid(tiny, root, dataset):
    """12 films in the published layout of a data set: classes a, b, c to train on, only b and c to test -> flags."""
    films = sorted(str(p) for p in tiny.videos.rglob("*.avi"))
    names = {"train": [f"{c}_{i}" for c in "abc" for i in (0, 1, 2)], "test": ["b_8", "c_8", "c_9"]}
    for subset, listed in names.items():
        below = {"folder": f"{subset}/", "k400": {"train": "train/", "test": "val/"}[subset]}.get(dataset, "")
        for name in listed:
            path = root / "videos" / (below + ("rgb" if dataset == "diving48" else name[0])) / f"{name}.avi"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(films.pop())
    splits = root / "splits"
    splits.mkdir()
    if dataset == "diving48":
        (splits / "Diving48_vocab.json").write_text(json.dumps(["a", "b", "c"]))
        for subset, listed in names.items():
            (splits / f"Diving48_V2_{subset}.json").write_text(json.dumps(
                [{"vid_name": n, "label": "abc".index(n[0]), "start_frame": 0, "end_frame": 9} for n in listed]))
    for c in "abc":  # of HMDB51
        lines = [f"{n}.avi {use}" for use, listed in enumerate(names.values(), 1) for n in listed if n[0] == c]
        (splits / f"{c}_test_split1.txt").write_text("\n".join(lines))
    for subset, listed in (("train", names["train"]), ("val", names["test"])):
        (splits / f"{subset}_videofolder.txt").write_text(
            "\n".join(f"{n[0]}/{n} 12 {'abc'.index(n[0])}" for n in listed))
    return ["--dataset", dataset, "--videos", str(root / "videos"), "--splits", str(splits)]


@pytest.mark.parametrize("dataset", ["folder", "k400", "diving48", "hmdb51"])
def test_every_data_set_s_layout(tiny, monkeypatch, tmp_path, dataset):
    """A class that the test list lacks moves no label: of features that are the class all is right."""
    def extract(net, videos, store, s, device, what, keep, done=(), rgb=None):
        f = F.one_hot(torch.tensor(["abc".index(Path(v.path).stem[0]) for v in videos]), 3).float().numpy()
        keep(0, {"rgb": f, "flow": f, "kept": np.arange(len(f)), "faults": np.array([], str)})
    monkeypatch.setattr(features, "extract_blocks", extract)
    flags = relaid(tiny, tmp_path, dataset)
    out = result(tiny, tmp_path, "retrieval", *UNTRAINED, *flags)
    assert (out["protocol"]["gallery"], out["protocol"]["queries"]) == (9, 3)
    assert out["results"]["rgb+flow"]["R@1"] == 100 and set(out["per_class"]["rgb"]) == {"b", "c"}
    out = result(tiny, tmp_path, "linear", *UNTRAINED, *flags, "--batch-size", "9", "--epochs", "30")
    assert out["results"]["flow"]["top-1"] == 100 and out["predictions"]["flow"] == [1, 2, 2]
    assert result(tiny, tmp_path, "cluster", *UNTRAINED, *flags, "--runs", "2")["protocol"]["clusters"] == 2


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
    assert mean_of_splits([a, b]) == {"rgb": {"R@1": 30, "R@1 standard error": 2.5}}
    a["rgb"]["R@50"] = 90  # of a gallery that the other split lacks
    assert mean_of_splits([a, b]) == mean_of_splits([b, a]) == {"rgb": {"R@1": 30, "R@1 standard error": 2.5}}


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------
def test_unreadable_videos_are_skipped_and_counted(tiny, tmp_path, capsys):
    store = tmp_path / "flow"
    store.mkdir()
    (store / "header.json").write_text((tiny.flow / "header.json").read_text())
    for p in sorted(tiny.flow.rglob("*.avi"))[1:]:
        (store / p.relative_to(tiny.flow)).parent.mkdir(exist_ok=True)
        (store / p.relative_to(tiny.flow)).symlink_to(p)
    assert command(tiny, "retrieval", *UNTRAINED, "--flow", str(store)) == 0
    out = capsys.readouterr().out
    assert "1 videos were skipped" in out and "has no flow of" in out


def test_classifiers_of_all_views_answer_the_same_videos(tiny, tmp_path, monkeypatch, capsys):
    """Of one test video RGB can't be read, of another there is no flow; each view's classifier reads its own."""
    films, store = tmp_path / "videos", tmp_path / "flow"
    shutil.copytree(tiny.videos, films)
    shutil.copytree(tiny.flow, store)
    test = read_split("ucf101", tiny.videos, tiny.splits, subset="test").videos
    (films / Path(test[0].path).relative_to(tiny.videos)).write_bytes(b"rubbish")
    (store / f"{test[5].name}.avi").unlink()
    monkeypatch.setattr(evaluate, "fit_clips", lambda net, views, train, store, recipe, s, *rest: new_classifier(
        net, views, len(train.classes), recipe, s, True, torch.device("cpu")).eval())
    for fusion in ("average", "probability"):
        out = result(tiny, tmp_path, "linear", *UNTRAINED, "--on", "clips", "--videos", str(films), "--flow",
                     str(store), "--fusion", fusion, "--out", str(tmp_path / "o"))
        assert [q["name"] for q in out["queries"]] == [v.name for i, v in enumerate(test) if i not in (0, 5)]
        assert {view: len(p) for view, p in out["predictions"].items()} == {"rgb": 8, "flow": 8, "rgb+flow": 8}
        assert len(out["left_out"]) == out["protocol"]["left_out"] == 2 and out["protocol"]["test"] == 8
        assert "2 videos were skipped" in capsys.readouterr().out


def test_a_name_that_is_no_unicode_costs_no_result(tiny, tmp_path, monkeypatch):
    perfect(monkeypatch)
    found = read_split("ucf101", tiny.videos, tiny.splits, subset="test")
    monkeypatch.setattr(evaluate, "read_split", lambda *args, **more: found._replace(
        classes=["caf\udce9", *found.classes[1:]], unused=("caf\udce9.avi: there, but in no list",),
        notes=("caf\udce9: a note",)))
    with open(tmp_path / "terminal", "w", encoding="utf-8") as f, contextlib.redirect_stdout(f):
        out = result(tiny, tmp_path, "retrieval", *UNTRAINED, "--per-class")
    said = (tmp_path / "terminal").read_text()
    assert out["classes"][0] == "caf\udce9" and all(rf"caf\udce9{x}" in said for x in (": a note", ".avi: there", "  "))


def test_unreadable_training_videos_are_said(tiny, tmp_path, capsys):
    store = tmp_path / "flow"
    store.mkdir()
    (store / "header.json").write_text((tiny.flow / "header.json").read_text())
    for p in sorted(tiny.flow.rglob("*.avi")):
        (store / p.relative_to(tiny.flow)).parent.mkdir(exist_ok=True)
        (store / p.relative_to(tiny.flow)).write_bytes(p.read_bytes())
    name = read_split("ucf101", tiny.videos, tiny.splits).videos[0].name
    (store / f"{name}.avi").write_bytes(b"rubbish")
    more = ["--views", "flow", "--epochs", "1", "--batch-size", "20", "--out",
            str(tmp_path / "o"), "--flow", str(store)]
    assert command(tiny, "linear", *UNTRAINED, "--on", "clips", *more) == 0
    assert f"1 training videos could not be read and were replaced by others; one: {store}" in capsys.readouterr().out


def test_classes_that_the_gallery_lacks(tiny, tmp_path):
    for name in ("classInd.txt", "testlist01.txt"):
        (tmp_path / name).write_text((tiny.splits / name).read_text())
    lines = (tiny.splits / "trainlist01.txt").read_text().splitlines()
    (tmp_path / "trainlist01.txt").write_text("\n".join(line for line in lines if "Walk" not in line))
    for more in (["retrieval"], ["linear"], ["finetune", "--out", str(tmp_path / "o")]):
        with pytest.raises(BadInput, match=r"1 classes of which no training video can be read \(Walk\)"):
            command(tiny, *more, *UNTRAINED, "--splits", str(tmp_path))


def test_one_video_in_a_class_is_said(tiny, tmp_path, capsys):
    for name in ("classInd.txt", "testlist01.txt"):
        (tmp_path / name).write_text((tiny.splits / name).read_text())
    lines = (tiny.splits / "trainlist01.txt").read_text().splitlines()
    lines.remove(next(line for line in lines if "Walk" in line))
    (tmp_path / "trainlist01.txt").write_text("\n".join(lines))
    assert command(tiny, "retrieval", *UNTRAINED, "--splits", str(tmp_path)) == 0
    assert "1 classes have one training video only: Walk" in capsys.readouterr().out


def test_bad_input_gets_an_error_message(tiny, tmp_path):
    checkpoint(tmp_path, flow_header={"kind": "flow", "short_side": 1})
    bare = tmp_path / "bare"  # a flow store without flow
    bare.mkdir()
    (bare / "header.json").write_text((tiny.flow / "header.json").read_text())
    for words, more in {
        "none of the 20 split1-train videos can be read; the first: .* has no flow": ["--checkpoint", "none", "--flow",
                                                                                      str(bare)],
        "doesn't exist; pretrain.py writes it": ["--checkpoint", str(tmp_path / "x.pt")],
        "trained with --arch r2plus1d18, not s3d": ["--checkpoint", str(tmp_path), "--arch", "s3d"],
        "other settings than the checkpoint's .*short_side: 1 in training": ["--checkpoint", str(tmp_path)],
        "is no flow store": ["--checkpoint", "none", "--flow", str(tmp_path)],
        "so there is nothing to test on": ["--checkpoint", "none", "--dataset", "folder"],
        "folder has one split; leave the flag out": ["--checkpoint", "none", "--dataset", "folder", "--split", "2"],
        "lacks trainlist03.txt": ["--checkpoint", "none", "--split", "3"],
        "names a split twice": ["--checkpoint", "none", "--split", "1", "1"],
        "clips of 4 frames and 64 px are too small for s3d.*raise --frames": [
            "--checkpoint", "none", "--arch", "s3d", "--frames", "4", "--size", "64"],
    }.items():
        with pytest.raises(BadInput, match=words):
            command(tiny, "retrieval", *(UNTRAINED[2:] if "none" in more else []), *more)
    with pytest.raises(BadInput, match="--out is missing"):
        command(tiny, "finetune", *UNTRAINED)
    with pytest.raises(BadInput, match=r"--batch-size 50 x 1 process.* is more than the 20 videos"):
        command(tiny, "linear", *UNTRAINED, "--batch-size", "50")
    with pytest.raises(BadInput, match=r"loss of .* is no longer finite; try a smaller --lr"):
        command(tiny, "linear", *UNTRAINED, "--batch-size", "10", "--lr", "1e38")
    (tmp_path / "checkpoint.pt").write_bytes(b"rubbish")
    with pytest.raises(BadInput, match="damaged or no checkpoint"):
        command(tiny, "retrieval", "--checkpoint", str(tmp_path))


@pytest.mark.parametrize(("name", "flag", "value"), [
    ("retrieval", "--batch-views", "0"), ("retrieval", "--workers", "-1"), ("retrieval", "--width", "nan"),
    ("retrieval", "--stride", "0"), ("retrieval", "--seed", "-1"), ("cluster", "--runs", "0"),
    ("cluster", "--seed", str(2**70)), ("linear", "--lr", "-1"), ("finetune", "--scale", "inf"),
    ("finetune", "--epochs", "1.5")])
def test_numbers_that_are_none(capsys, name, flag, value):
    with pytest.raises(SystemExit, match="2"):
        evaluate.arguments([name, "--checkpoint", "none", flag, value, *(["2"] if flag == "--scale" else [])])
    assert f"error: argument {flag}: {value} must be a " in capsys.readouterr().err


def test_a_classifier_is_no_checkpoint_of_pre_training(tiny, tmp_path):
    """Of evaluate.py finetune, whose files are checkpoints, too."""
    path = tmp_path / "finetune-split1-rgb.pt"
    save_checkpoint(path, {"settings": {}, "step": 1, "model": {"head.2.bias": torch.ones(1)}})
    with pytest.raises(BadInput, match=r"rgb\.pt is a classifier trained by evaluate\.py; give the checkpoint of"):
        command(tiny, "retrieval", "--checkpoint", str(path))
    with pytest.raises(BadInput, match=r"rgb\.pt is a classifier"):
        evaluate.evaluate(evaluate.arguments(["export", "--checkpoint", str(path), "--out", str(tmp_path / "e.pt")]))


def test_both_lists_are_read_before_features_are_made(tiny, monkeypatch, tmp_path):
    """A folder without test videos is said at once, not after hours."""
    (tmp_path / "train").symlink_to(tiny.videos)
    monkeypatch.setattr(evaluate, "load_or_extract", lambda *_: pytest.fail("extracted"))
    with pytest.raises(BadInput, match="test"):
        evaluate.evaluate(evaluate.arguments(["retrieval", *UNTRAINED, "--dataset", "folder", "--videos", str(tmp_path),
                                              "--flow", str(tiny.flow)]))


def test_no_file_of_features_of_nothing(tiny, tmp_path, monkeypatch, capsys):
    def decode(*_):
        raise BadInput("no video")

    monkeypatch.setattr("support.frames.frames_at", decode)
    with pytest.raises(BadInput, match="none of the 20 split1-train videos can be read; the first: no video"):
        command(tiny, "features", *UNTRAINED, "--features", str(tmp_path / "f"), "--workers", "0")
    assert "written" not in capsys.readouterr().out and not list((tmp_path / "f").glob("*.npz"))


# --- bad input of several processes ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("flags", "words"), [(["--flow", "nowhere"], "nowhere is no flow store"),
                                              (["--split", "1", "1"], "names a split twice")])
def test_bad_input_is_printed_by_one_process(tiny, forked, tmp_path, flags, words):
    """Found by each for itself, before the processes meet and after."""
    said = in_two_processes(forked, tmp_path / "said", "evaluate", "retrieval", *tiny.common(), *UNTRAINED, *flags,
                            status=(2, 2))
    assert said.count(words) == 1 and said.startswith("error: ") and "Traceback" not in said
