"""Features: extracted once, kept and checked; what each file is of, and what the commands make of it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.evaluation import UNTRAINED, checkpoint, command, in_two_processes, result

import data
import evaluate
import flow
from support import features, inference
from support.datasets import read_split
from support.errors import BadInput
from support.files import load_arrays, save_arrays
from support.stores import FlowStore


def forbid(monkeypatch):
    """From here on nothing may be extracted."""
    def extract(*args, **kwargs):
        raise AssertionError("features were extracted again")
    monkeypatch.setattr(features, "extract_blocks", extract)


@pytest.mark.parametrize(("protocol", "stride"), [("goca", 1), ("coclr", 1), ("goca", 2)])
def test_features_are_the_mean_of_the_views(tiny, protocol, stride):
    s = evaluate.arguments(["retrieval", *tiny.common(), *UNTRAINED, "--workers", "0", "--batch-views", "3",
                            "--protocol", protocol, "--stride", str(stride)])
    net, settings = features.load_network(s)
    s.stride, s.pool = settings["stride"], "avg"
    found, store = read_split("ucf101", tiny.videos, tiny.splits), FlowStore(tiny.flow)
    found = found._replace(videos=found.videos[:3])
    f = features.load_or_extract(net, found, store, s, torch.device("cpu"), "x")
    assert len(f.videos) == 3 and f.skipped == []
    clips = data.TestClips(found.videos, store, protocol=protocol, frames=4, size=16, stride=stride)[1]
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
    for again in (["cluster", "--runs", "2"], ["linear", "--epochs", "2", "--batch-size", "10"]):
        out = [result(tiny, tmp_path, again[0], *more, *again[1:]) for _ in range(2)]
        assert all(out[0][k] == out[1][k] for k in out[0] if k != "seconds")  # the same command, the same digits
    for other in (["--seed", "1"], ["--protocol", "coclr"], ["--frames", "9"]):  # other weights, views, clips
        with pytest.raises(AssertionError, match="extracted again"):
            command(tiny, "retrieval", *more, *other)


def test_an_interrupted_extraction_goes_on(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "BLOCK", 4)
    whole = result(tiny, tmp_path, "retrieval", *UNTRAINED)
    forward, calls = inference.mean_over_views, []

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


def test_parts_of_films_that_were_replaced_are_made_anew(tiny, tmp_path, monkeypatch):
    """Those of an interrupted extraction; parts of before, which don't say, are joined with others."""
    shutil.copytree(tiny.videos, tmp_path / "videos")
    more = [*UNTRAINED, "--features", str(tmp_path / "f"), "--videos", str(tmp_path / "videos")]
    monkeypatch.setattr(features, "BLOCK", 4)
    real = features.extract_blocks
    extracted = []

    def three(net, videos, store, s, device, what, keep, done, rgb):
        extracted.append(len(videos) - sum(len(videos[4 * b:4 * b + 4]) for b in done))
        real(net, videos, store, s, device, what, keep, {*done, *range(3, 9)} if len(extracted) == 1 else done, rgb)
        if len(extracted) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(features, "extract_blocks", three)
    with pytest.raises(KeyboardInterrupt):
        command(tiny, "features", *more)
    third = sorted((tmp_path / "f").iterdir())[2]
    _, arrays = load_arrays(third, "part of features", "x")
    arrays.pop("bytes")
    save_arrays(third, "part of features", {}, **arrays)
    found = read_split("ucf101", tmp_path / "videos", tiny.splits).videos
    Path(found[5].path).write_bytes(Path(found[5].path).read_bytes() + b"\0")  # of the second part
    assert command(tiny, "features", *more) == 0
    assert extracted == [20, 12, 10]  # the second part again, the fourth and the fifth; the test list
    assert command(tiny, "retrieval", *more) == 0


def test_two_evaluations_of_one_network_at_once(tiny, tmp_path, monkeypatch):
    """The first that is done takes the parts away, which the other has made, too."""
    more = [*UNTRAINED, "--features", str(tmp_path / "f")]
    real, others = features.extract_blocks, []

    def slower(*args, **kwargs):
        real(*args, **kwargs)
        if len(others) < 2:  # lists
            others.append("result")
            assert command(tiny, "cluster", "--runs", "1", *more) == 0
    monkeypatch.setattr(features, "extract_blocks", slower)
    assert result(tiny, tmp_path, "retrieval", *more)["results"]["flow"]["R@1"] > 0
    assert len(list((tmp_path / "f").iterdir())) == 2 and others


def test_two_processes_extract_what_one_does(tiny, forked, tmp_path):
    assert features.BLOCK < 20  # so that both have something to do
    one = result(tiny, tmp_path, "retrieval", *UNTRAINED)
    in_two_processes(forked, tmp_path / "said", "evaluate", "retrieval", *tiny.common(), *UNTRAINED, "--workers", "0",
                     "--features", tmp_path / "f", "--json", tmp_path / "two.json")
    two = json.loads((tmp_path / "two.json").read_text())
    assert one["results"] == two["results"] and one["neighbours"] == two["neighbours"]
    assert [v for v in (tmp_path / "f").iterdir() if v.name.startswith(".")] == []


@pytest.mark.parametrize("rgb", [False, True])
def test_features_of_a_film_that_was_replaced_are_refused(tiny, tmp_path, rgb):
    """Under its old name; its flow may be that of before."""
    videos, more = tmp_path / "videos", [*UNTRAINED, "--features", str(tmp_path / "f")]
    shutil.copytree(tiny.videos, videos)
    more += ["--videos", str(videos)]
    if rgb:
        assert flow.main(["--videos", str(videos), "--out", str(tmp_path / "flow"), "--rgb", str(tmp_path / "rgb"),
                          "--short-side", "0", "--warps", "1", "--epsilon", "0.1"]) == 0
        more += ["--rgb", str(tmp_path / "rgb"), "--flow", str(tmp_path / "flow")]
    assert command(tiny, "features", *more) == 0
    assert command(tiny, "retrieval", *more) == 0
    film = sorted((tmp_path / "rgb" if rgb else videos).rglob("*.avi"))[-1]
    film.write_bytes(film.read_bytes() + b"\0")
    with pytest.raises(BadInput, match=rf"of 1 of \d+ videos .* the first .*{film.stem}; remove it"):
        command(tiny, "retrieval", *more)
    assert command(tiny, "retrieval", *more, "--views", "flow") == 0  # that is of flow, and hasn't changed


def test_the_file_of_features_is_checked(tiny, tmp_path):
    more = [*UNTRAINED, "--features", str(tmp_path / "f")]
    assert command(tiny, "features", *more) == 0
    path = next((tmp_path / "f").glob("*train*"))
    header, arrays = load_arrays(path, "features", "x")
    assert arrays["rgb"].shape == (20, 64) and len(arrays["names"]) == len(arrays["labels"]) == 20
    save_arrays(path, "features", {**header, "key": "0" * 16}, **arrays)
    with pytest.raises(BadInput, match="features of another checkpoint"):
        command(tiny, "retrieval", *more)
    path.write_bytes(b"rubbish")
    with pytest.raises(BadInput, match=r"damaged or no features file .*: the same command, once it is removed"):
        command(tiny, "features", *more)
    arrays["flow"][3, 5] = np.nan
    save_arrays(path, "features", header, **arrays)
    with pytest.raises(BadInput, match="features that are not finite"):
        command(tiny, "retrieval", *more)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(BadInput, match="damaged or no features file"):
        command(tiny, "retrieval", *more)


def test_weights_that_are_not_finite_are_named(tiny, tmp_path, monkeypatch):
    run = checkpoint(tmp_path)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    next(t for k, t in state["model"].items() if "backbones.flow" in k).fill_(torch.nan)
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(BadInput, match="not finite: the weights of"):
        command(tiny, "retrieval", "--checkpoint", run)


@pytest.fixture
def extracted(monkeypatch):
    """Random features in place of a network's -> the number of videos of each extraction; the same for the same
    weights, subset and --stride, in clusters that are no clusters."""
    calls = []

    def extract(net, videos, store, s, device, what, keep, done=(), rgb=None):
        calls.append(len(videos))
        rng = np.random.default_rng([len(videos), s.stride])
        values = {view: rng.standard_normal((len(videos), 6), np.float32) + 1 for view in net.backbones}
        for b in range(-(-len(videos) // features.BLOCK)):
            at = slice(b * features.BLOCK, (b + 1) * features.BLOCK)
            keep(b, {**{view: f[at] for view, f in values.items()}, "kept": np.arange(len(videos))[at],
                     "faults": np.array([], str)})

    monkeypatch.setattr(features, "extract_blocks", extract)
    return calls


def lists(tiny, root, **other):
    """A folder of the set's lists, some of them other lines -> flags."""
    root.mkdir()
    for name in ("classInd", "trainlist01", "testlist01"):
        lines = (tiny.splits / f"{name}.txt").read_text().splitlines()
        (root / f"{name}.txt").write_text("\n".join(other.get(name, lambda x: x)(lines)))
    return ["--splits", str(root)]


def flow_of(tiny, root, leave_out=0, **header):
    """A flow store with the set's files, the first few left out, and perhaps another header -> flags."""
    for path in sorted(tiny.flow.rglob("*.avi"))[leave_out:]:
        (root / path.relative_to(tiny.flow)).parent.mkdir(parents=True, exist_ok=True)
        (root / path.relative_to(tiny.flow)).symlink_to(path)
    (root / "header.json").write_text(json.dumps({**json.loads((tiny.flow / "header.json").read_text()), **header}))
    return ["--flow", str(root)]


# --- a file is of exactly these weights, videos, flow and views ------------------------------------------------------
def test_whatever_decides_the_features_makes_them_anew(tiny, tmp_path, extracted):
    base = [*UNTRAINED, "--features", str(tmp_path / "f")]
    swapped = lists(tiny, tmp_path / "swapped", trainlist01=lambda x: x[::-1])
    renamed = lists(tiny, tmp_path / "renamed", classInd=lambda x: [f"{i} {line.split()[1]}" for i, line in
                                                                    enumerate(x[::-1], 1)])  # other labels
    for other, anew in (([], [20, 10]), ([], []), (["--size", "33"], [20, 10]), (["--stride", "2"], [20, 10]),
                        (["--pool", "1x2x2"], [20, 10]), (renamed, [20, 10]), (swapped, [20]),  # the other is the same
                        (flow_of(tiny, tmp_path / "quality", quality=7), [20, 10]),
                        (flow_of(tiny, tmp_path / "less", leave_out=1), [20])):  # the first film is a training film
        extracted.clear()
        assert command(tiny, "features", *base, *other) == 0 and extracted == anew, other


@pytest.mark.parametrize(("flag", "value", "trained"), [("--width", "0.25", "0.125"), ("--pool", "1x2x2", "avg"),
                                                        ("--arch", "s3d", "r2plus1d18")])
def test_a_flag_that_says_another_network_than_the_checkpoint_s_is_refused(tiny, tmp_path, flag, value, trained):
    run = checkpoint(tmp_path)
    with pytest.raises(BadInput, match=f"was trained with {flag} {trained}, not {value}; leave the flag out"):
        command(tiny, "features", "--checkpoint", run, flag, value)


# --- what is made of them --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("fusion", ["average", "similarity"])
@pytest.mark.parametrize("protocol", ["goca", "coclr"])
def test_neighbours_are_those_of_the_stored_features(tiny, tmp_path, extracted, protocol, fusion):
    """A loop over queries: centred where the protocol says so, fused as the flag says."""
    out = result(tiny, tmp_path, "retrieval", *UNTRAINED, "--features", str(tmp_path / "f"), "--protocol", protocol,
                 "--fusion", fusion)
    assert (out["protocol"]["protocol"], out["protocol"]["fusion"]) == (protocol, fusion)
    gallery, queries = (np.load(*(tmp_path / "f").glob(f"*-split1-{subset}-{protocol}-*.npz"))
                        for subset in ("train", "test"))

    def unit(f, each):
        f = f[each].astype(np.float64)
        f = f - (f.mean(0) if protocol == "coclr" else 0)
        return f / np.linalg.norm(f, axis=1, keepdims=True)

    g, q = ({view: unit(f, view) for view in ("rgb", "flow")} for f in (gallery, queries))
    for f in (g, q):
        both = (f["rgb"] + f["flow"]) / 2
        f["rgb+flow"] = (both / np.linalg.norm(both, axis=1, keepdims=True) if fusion == "average" else
                         np.concatenate([f["rgb"], f["flow"]], axis=1))
    for view in ("rgb", "flow", "rgb+flow"):
        near = np.array([np.argsort(-(g[view] @ x), kind="stable") for x in q[view]])
        assert out["neighbours"][view] == near[:, :10].tolist()
        right = gallery["labels"][near] == queries["labels"][:, None]
        for k in (1, 5, 10):
            assert out["results"][view][f"R@{k}"] == pytest.approx(100 * right[:, :k].any(1).mean())
    assert [Path(v["path"]).stem for v in out["gallery"]] == [Path(str(n)).name for n in gallery["names"]]


def test_the_seed_of_clusters_draws_other_starts(tiny, tmp_path, extracted):
    listed = [line.split()[0] for line in (tiny.splits / "trainlist01.txt").read_text().splitlines()]
    more, seen = lists(tiny, tmp_path / "lists", testlist01=lambda _: listed), []  # two films a class
    for seed in ("0", "1", "0"):
        out = result(tiny, tmp_path, "cluster", "--checkpoint", checkpoint(tmp_path), *more, "--runs", "3", "--seed",
                     seed)
        assert (out["protocol"]["seed"], out["protocol"]["runs"]) == (int(seed), 3)
        seen.append(out["results"]["rgb"]["inertia"])
    assert seen[0] == seen[2] != seen[1] and extracted == [20]


def test_the_numbers_name_the_step_of_their_checkpoint(tiny, tmp_path, extracted):
    run = checkpoint(tmp_path, epochs=3)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save({**state, "step": 77}, tmp_path / "checkpoint.pt")
    protocol = result(tiny, tmp_path, "retrieval", "--checkpoint", run)["protocol"]
    assert protocol["step"] == 77 and protocol["pretraining"] == {"epochs": 3, "seed": 0}


# --- what is left out ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more", [["retrieval"], ["cluster", "--runs", "1"], ["linear", "--epochs", "1"],
                                  ["linear", "--on", "clips"], ["finetune"]], ids=" ".join)
def test_what_a_list_names_and_the_folder_lacks_is_counted(tiny, tmp_path, monkeypatch, extracted, more):
    """One training and two test films; `cluster` reads the test list alone."""
    absent = lists(tiny, tmp_path / "lists", trainlist01=lambda x: [*x, "Walk/v_Walk_g99_c01.avi 1"],
                   testlist01=lambda x: [*x, "Walk/v_Walk_g98_c01.avi", "Walk/v_Walk_g98_c02.avi"])
    monkeypatch.setattr(evaluate, "fit_clips", lambda *args: None)
    monkeypatch.setattr(evaluate, "predict_clips", lambda classifier, test, *args: (
        torch.eye(10)[[v.label for v in test.videos]], {}))
    if "linear" in more or "finetune" in more:
        more = [*more, "--batch-size", "10", "--out", str(tmp_path / "o")]
    out = result(tiny, tmp_path, *more[:1], *UNTRAINED, *absent, *more[1:])
    names = {line.split(":")[0].rpartition("/")[2] for line in out["left_out"] if "listed, but absent" in line}
    expected = {"v_Walk_g98_c01", "v_Walk_g98_c02"} | ({"v_Walk_g99_c01"} if more[0] != "cluster" else set())
    assert {n.removesuffix(".avi") for n in names} == expected and out["protocol"]["left_out"] == len(expected)


def test_videos_of_no_class_are_left_out(tiny, tmp_path, extracted):
    films = sorted(tiny.videos.rglob("*.avi"))
    for k, name in enumerate(f"{s}/{n}" for s in ("train", "test") for n in ("a/1", "a/2", "b/1", "b/2", "bare")):
        path = tmp_path / "videos" / f"{name}.avi"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(films[k])
    out = result(tiny, tmp_path, "retrieval", *UNTRAINED, "--dataset", "folder", "--videos", str(tmp_path / "videos"))
    assert extracted == [4, 4] and (out["protocol"]["gallery"], out["protocol"]["queries"]) == (4, 4)
    assert out["protocol"]["left_out"] == 2 and all("bare: there, but of no class" in line for line in out["left_out"])
    assert all(v["label"] >= 0 for v in out["gallery"] + out["queries"])
    s = evaluate.arguments(["retrieval", *tiny.common(), *UNTRAINED, "--dataset", "folder"])
    s.videos = str(tmp_path / "videos" / "train" / "a")
    with pytest.raises(BadInput, match="has no labels, which retrieval needs"):
        evaluate.labelled_videos(SimpleNamespace(s=s, rank=0, films=None, store=None, rgb=None), 1, "train")
