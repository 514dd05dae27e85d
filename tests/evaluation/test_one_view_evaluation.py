"""evaluate.py --views rgb without a flow store, --views flow without a video."""

import json

import numpy as np
import pytest
import torch
from helpers.evaluation import UNTRAINED, checkpoint

import evaluate
import flow
import model
import search
from support import videos as videos_module
from support.errors import BadInput
from support.weights import export, load

NETWORK = [*UNTRAINED, "--workers", "0"]


def inputs(tiny, view):
    """What a view is read from, and nothing else."""
    read = ["--videos", str(tiny.videos)] if view == "rgb" else ["--flow", str(tiny.flow)]
    return ["--dataset", "ucf101", "--splits", str(tiny.splits), *read, "--workers", "0"]


def run(tmp_path, name, *more):
    path = tmp_path / "r.json"
    assert evaluate.evaluate(evaluate.arguments([name, *more, "--json", str(path)])) == 0
    return json.loads(path.read_text())


@pytest.fixture
def only(tiny, monkeypatch):
    """only("flow"): from here on no video is opened; only("rgb"): no file of flow."""
    def of(view):
        if view == "flow":
            monkeypatch.setattr(videos_module, "_open_decoder", lambda path: pytest.fail(f"{path} was opened"))
        else:
            monkeypatch.setattr(evaluate, "FlowStore", lambda root: pytest.fail(f"{root} was opened"))
    return of


@pytest.fixture(scope="module")
def of_both(tiny, tmp_path_factory):
    """Numbers of both views, as they always were, and the folder of their features."""
    root = tmp_path_factory.mktemp("both")
    common = [*tiny.common(), *NETWORK, "--features", str(root / "f")]
    numbers = {name: run(root, name, *common, *more) for name, more in (
        ("retrieval", []), ("cluster", ["--runs", "3"]), ("linear", ["--epochs", "3", "--batch-size", "10"]))}
    return numbers, root / "f"


# --- frames at a rate ------------------------------------------------------------------------------------------------
def test_rgb_alone_is_read_at_the_rate_of_training(tiny, tmp_path):
    """Without flow, whose store says at which."""
    for name, trained in (("flow", {"flow_header": {"fps": 6.0}}), ("rgb", {"rgb_fps": 6.0})):
        (tmp_path / name).mkdir()
        of = ["--checkpoint", checkpoint(tmp_path / name, **trained)]
        with pytest.raises(BadInput, match=r"on frames at 6 a second .*here they are as stored; give --rgb, a store"):
            run(tmp_path, "retrieval", *inputs(tiny, "rgb"), *of, "--views", "rgb")
        with pytest.raises(BadInput, match="on frames at 6 a second"):
            search.main(["index", *of, "--videos", str(tiny.videos), "--out", str(tmp_path / "i.npz")])
    rgb = tmp_path / "store"
    assert flow.main(["--videos", str(tiny.videos), "--out", str(tmp_path / "f"), "--rgb", str(rgb), "--fps", "6",
                      "--method", "dis", "--short-side", "0", "--workers", "1"]) == 0
    (tmp_path / "run").mkdir()
    with pytest.raises(BadInput, match=r"on frames as stored .*here they are at 6 a second; leave --rgb out"):
        run(tmp_path, "retrieval", *inputs(tiny, "rgb"), "--checkpoint", checkpoint(tmp_path / "run"), "--views", "rgb",
            "--rgb", str(rgb))
    assert run(tmp_path, "retrieval", *inputs(tiny, "rgb"), *of, "--views", "rgb", "--rgb", str(rgb))["results"]


# --- numbers ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("view", model.VIEWS)
def test_numbers_of_one_view_are_those_of_both(tiny, tmp_path, of_both, only, view):
    """Neighbours, clusters and the probe; the features come once, in a file of their own."""
    only(view)
    common = [*inputs(tiny, view), *UNTRAINED, "--views", view, "--features", str(tmp_path / "f")]
    assert run(tmp_path, "features", *common)["results"].keys() == {view}
    files = {p: p.read_bytes() for p in (tmp_path / "f").iterdir()}
    assert len(files) == 2 and not {p.name for p in files} & {p.name for p in of_both[1].iterdir()}
    with np.load(max(files)) as arrays:
        assert view in arrays and {"rgb", "flow"} & set(arrays) == {view}
    for name, more in (("retrieval", []), ("cluster", ["--runs", "3"]),
                       ("linear", ["--epochs", "3", "--batch-size", "10"])):
        out, expected = run(tmp_path, name, *common, *more), of_both[0][name]
        assert out["results"].keys() == {view}
        assert out["results"][view] == pytest.approx(expected["results"][view], rel=1e-4, abs=1e-6)
        assert out["protocol"]["weights"] == expected["protocol"]["weights"]
        if name == "retrieval":
            assert out["neighbours"][view] == expected["neighbours"][view]
    assert {p: p.read_bytes() for p in (tmp_path / "f").iterdir()} == files


def test_features_of_both_serve_one(tiny, tmp_path, of_both, monkeypatch, capsys):
    """Where --flow is given, too, and every video has its flow."""
    before = sorted(of_both[1].iterdir())
    for view in model.VIEWS:
        out = run(tmp_path, "retrieval", *tiny.common(), *NETWORK, "--views", view, "--features", str(of_both[1]))
        assert sorted(of_both[1].iterdir()) == before
        assert "features of 20 split1-train videos" in capsys.readouterr().out
        assert out["results"][view] == of_both[0]["retrieval"]["results"][view]
    # a video without flow is in those of RGB all the same
    some = tmp_path / "flow"
    (some / "x").mkdir(parents=True)
    (some / "header.json").write_text((tiny.flow / "header.json").read_text())
    files = sorted(tiny.flow.rglob("*.avi"))
    for path in files[1:]:
        (some / path.relative_to(tiny.flow)).parent.mkdir(parents=True, exist_ok=True)
        (some / path.relative_to(tiny.flow)).symlink_to(path)
    lists = ["--dataset", "ucf101", "--videos", str(tiny.videos), "--splits", str(tiny.splits), "--flow", str(some)]
    both = run(tmp_path, "retrieval", *lists, *NETWORK, "--features", str(tmp_path / "f"))
    assert both["protocol"]["gallery"] + both["protocol"]["queries"] == 29
    rgb = run(tmp_path, "retrieval", *lists, *NETWORK, "--views", "rgb", "--features", str(tmp_path / "f"))
    assert rgb["protocol"]["gallery"] + rgb["protocol"]["queries"] == 30


@pytest.mark.parametrize("view", model.VIEWS)
@pytest.mark.parametrize("name", [["finetune"], ["linear", "--on", "clips"]], ids="".join)
def test_training_on_clips_of_one_view(tiny, tmp_path, only, name, view):
    """Loss and predictions are those of the run that has both stores."""
    more = ["--epochs", "1", "--batch-size", "10", "--views", view, "--protocol", "coclr"]
    both = run(tmp_path, *name, *tiny.common(), *NETWORK, *more, "--out", str(tmp_path / "both"))
    only(view)
    out = run(tmp_path, *name, *inputs(tiny, view), *UNTRAINED, *more, "--out", str(tmp_path / "one"))
    assert out["predictions"] == both["predictions"] and out["protocol"]["test"] == 10
    (a,), (b,) = ([json.loads(p.read_text())["history"] for p in (tmp_path / folder).glob("*.json")]
                  for folder in ("both", "one"))
    assert a == b and a[0]["loss"] > 0


# --- checkpoints and exports of one view -----------------------------------------------------------------------------
@pytest.mark.parametrize("view", model.VIEWS)
def test_a_run_of_one_view_is_evaluated_by_it_alone(tiny, tmp_path, only, view):
    only(view)
    of = checkpoint(tmp_path, method="sview", views=[view])
    out = run(tmp_path, "retrieval", "--checkpoint", of, *inputs(tiny, view))
    assert out["results"].keys() == {view} and out["protocol"]["method"] == "sview"
    assert out["protocol"]["pretraining"]["views"] == [view]
    export(of, tmp_path / "export.pt")
    net, settings = load(str(tmp_path / "export.pt"))
    assert list(net.backbones) == [view] == settings["views"]
    weights = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"]
    assert all(torch.equal(x, weights[f"backbones.{k}"]) for k, x in net.backbones.state_dict().items())
    again = run(tmp_path, "retrieval", "--weights", str(tmp_path / "export.pt"), *inputs(tiny, view))
    assert again["neighbours"] == out["neighbours"] and again["results"] == out["results"]
    other = next(v for v in model.VIEWS if v != view)
    with pytest.raises(BadInput, match=f"--views {other}: {tmp_path} holds a network for {view} only$"):
        run(tmp_path, "retrieval", "--checkpoint", of, *tiny.common(), "--workers", "0", "--views", other)
    with pytest.raises(BadInput, match=f"export.pt holds no network for {other}; it is an export for {view} only"):
        load(f"{other}={tmp_path / 'export.pt'}")


# --- what is missing -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("view", "more", "words"), [
    ("rgb", [], "^--flow is missing: the store of flow.py .*or take --views rgb, which needs none$"),
    ("rgb", ["--views", "rgb+flow"], "^--flow is missing"),
    ("rgb", ["--views", "rgb", "flow"], "^--flow is missing"),
    ("flow", [], "^--videos is missing: the folder of the videos; or take --views flow"),
    ("flow", ["--views", "rgb"], "^--videos is missing")])
@pytest.mark.parametrize("name", ["retrieval", "cluster", "linear", "finetune"])
def test_what_a_view_lacks_is_said(tiny, tmp_path, name, view, more, words):
    with pytest.raises(BadInput, match=words):
        run(tmp_path, name, *inputs(tiny, view), *UNTRAINED, *more, *["--out", "o"] * (name == "finetune"))


def test_videos_that_are_gone_are_of_no_concern_to_flow(tiny, tmp_path, only):
    """--videos may name a folder that isn't there, and the lists films that the store lacks: those are counted."""
    only("flow")
    lists = tmp_path / "lists"
    lists.mkdir()
    for name in ("classInd.txt", "trainlist01.txt", "testlist01.txt"):
        more = "Walk/v_Walk_g99_c01.avi\n" if name.startswith("test") else ""
        (lists / name).write_text((tiny.splits / name).read_text() + more)
    out = run(tmp_path, "retrieval", "--dataset", "ucf101", "--videos", str(tmp_path / "gone"), "--splits", str(lists),
              "--flow", str(tiny.flow), *NETWORK, "--views", "flow")
    assert out["protocol"]["left_out"] == 1 and "v_Walk_g99_c01: listed, but absent" in out["left_out"][0]
    assert (out["protocol"]["gallery"], out["protocol"]["queries"]) == (20, 10)


def test_folders_of_flow_give_classes(tiny, tmp_path, only):
    """--dataset folder: the store is divided as the videos were."""
    only("flow")
    store = tmp_path / "flow"
    for part in ("train", "test"):
        for k, path in enumerate(sorted(tiny.flow.rglob("*.avi"))[:4]):
            at = store / part / "ab"[k % 2] / path.name
            at.parent.mkdir(parents=True, exist_ok=True)
            at.symlink_to(path)
    (store / "header.json").write_text((tiny.flow / "header.json").read_text())
    out = run(tmp_path, "retrieval", "--flow", str(store), *NETWORK, "--views", "flow")
    assert out["classes"] == ["a", "b"] and out["results"]["flow"]["R@1"] == 100  # the same films in both parts
