"""Retrieval: numbers by hand, both protocols, and the command end to end."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import model


def test_recall_by_hand():
    gallery = torch.tensor([0] * 6 + [1] * 6)
    queries = torch.tensor([0, 1])
    near = torch.tensor([[0, 6, 7, 8, 9, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]])
    r = evaluate.recall(near, queries, gallery)
    assert r["R@1"] == 50 and r["R@5"] == 100 and "R@20" not in r
    assert r["R@1 standard error"] == pytest.approx(100 * math.sqrt(0.25 / 2))
    assert r["R@1 chance"] == pytest.approx(50)
    assert r["R@5 chance"] == pytest.approx(100 * (1 - math.comb(6, 5) / math.comb(12, 5)))
    assert r["R@10 chance"] == pytest.approx(100)


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


@pytest.mark.parametrize("view", ["rgb", "flow", "rgb+flow"])
@pytest.mark.parametrize("fusion", ["average", "similarity"])
def test_nearest_is_the_loop_over_queries(view, fusion):
    q, g = ({v: unit(n, 8, seed=i + n) for i, v in enumerate(model.VIEWS)} for n in (1100, 30))
    near = evaluate.nearest(q, g, view, fusion, 5)
    for i in (0, 500, 1099):
        if view == "rgb+flow" and fusion == "average":
            a, b = (((d["rgb"] + d["flow"]) / 2) for d in (q, g))
            s = F.cosine_similarity(a[i][None], b)
        else:
            s = sum(g[v] @ q[v][i] for v in view.split("+"))
        assert near[i].tolist() == s.argsort(descending=True)[:5].tolist()


def test_coclr_centres_each_set_by_its_own_mean():
    x = torch.randn(9, 4) + 5
    torch.testing.assert_close(evaluate.prepare(x, "coclr"), F.normalize(x - x.mean(0), dim=1))
    torch.testing.assert_close(evaluate.prepare(x, "goca"), F.normalize(x, dim=1))


def command(tiny, *more):
    base = ["retrieval", *tiny.common(), "--workers", "0"]
    return evaluate.retrieval(evaluate.arguments([*base, *more]))


UNTRAINED = ["--checkpoint", "none", "--arch", "s3d", "--width", "0.125", "--frames", "8", "--size", "32"]


@pytest.mark.parametrize("protocol", ["goca", "coclr"])
def test_retrieval_end_to_end(tiny, tmp_path, protocol, capsys):
    assert command(tiny, *UNTRAINED, "--protocol", protocol, "--json", str(tmp_path / "r.json")) == 0
    out = json.loads((tmp_path / "r.json").read_text())
    assert out["protocol"]["protocol"] == protocol and out["protocol"]["method"] == "untrained"
    assert (out["protocol"]["gallery"], out["protocol"]["queries"], out["protocol"]["classes"]) == (20, 10, 10)
    assert set(out["results"]) == {"rgb", "flow", "rgb+flow"}
    for view, r in out["results"].items():
        assert r["R@20"] == 100 and r["R@1 chance"] == pytest.approx(10)
        near = np.array(out["neighbours"][view])
        labels = np.array([g["label"] for g in out["gallery"]])
        query = np.array([q["label"] for q in out["queries"]])
        assert near.shape == (10, 10) and r["R@1"] == pytest.approx(100 * (labels[near[:, 0]] == query).mean())
    assert "R@1" in capsys.readouterr().out


def test_features_are_the_mean_of_the_views(tiny):
    s = evaluate.arguments(["retrieval", *tiny.common(), *UNTRAINED, "--workers", "0", "--batch-views", "3"])
    net, settings = evaluate.load_network(s)
    s.stride = settings["stride"]
    found, store = data.read_split("ucf101", tiny.videos, tiny.splits), data.FlowStore(tiny.flow)
    features, kept, faults = evaluate.extract(net, found.videos[:2], store, s, torch.device("cpu"), "x")
    assert len(kept) == 2 and faults == []
    clips = data.TestClips(found.videos, store, frames=8, size=32)[1]
    with torch.no_grad():
        each = net.features("flow", data.normalise_flow(clips["flow"]))
    expected = (F.normalize(each, dim=1) * clips["weight"][:, None]).sum(0)
    torch.testing.assert_close(features["flow"][1], expected, rtol=1e-4, atol=1e-5)


def test_a_perfect_representation_scores_100(tiny, monkeypatch, tmp_path):
    """Features that are the label must give R@1 = 100: labels, gallery and queries keep their places."""
    def labels(net, videos, *args):
        f = F.one_hot(torch.tensor([v.label for v in videos]), 10).float()
        return {v: f for v in model.VIEWS}, videos, []
    monkeypatch.setattr(evaluate, "extract", labels)
    assert command(tiny, *UNTRAINED, "--json", str(tmp_path / "r.json")) == 0
    assert json.loads((tmp_path / "r.json").read_text())["results"]["rgb+flow"]["R@1"] == 100


def test_unreadable_videos_are_left_out_and_counted(tiny, tmp_path, capsys):
    store = tmp_path / "flow"
    store.mkdir()
    (store / "header.json").write_text((tiny.flow / "header.json").read_text())
    for p in sorted(tiny.flow.rglob("*.avi"))[1:]:
        (store / p.relative_to(tiny.flow)).parent.mkdir(exist_ok=True)
        (store / p.relative_to(tiny.flow)).symlink_to(p)
    assert command(tiny, *UNTRAINED, "--flow", str(store)) == 0
    out = capsys.readouterr().out
    assert "1 videos were left out" in out and "has no flow of" in out


def test_bad_input_gets_a_sentence(tiny, tmp_path):
    state = {"settings": {"arch": "s3d", "width": 0.125, "hidden": 8, "pool": "avg", "method": "goca", "seed": 0,
                          "frames": 8, "size": 32, "stride": 1, "flow_header": {"kind": "flow", "short_side": 1}},
             "step": 1}
    net = model.two_view(state["settings"], torch.eye(4))
    data.save_checkpoint(tmp_path / "checkpoint.pt", {**state, "model": net.state_dict()})
    for words, more in {
        "doesn't exist; pretrain.py writes it": ["--checkpoint", str(tmp_path / "x.pt")],
        "trained with --arch s3d, not r2plus1d18": ["--checkpoint", str(tmp_path), "--arch", "r2plus1d18"],
        "other settings than the checkpoint's .*short_side: 1 in training": ["--checkpoint", str(tmp_path)],
        "is no flow store": ["--checkpoint", "none", "--flow", str(tmp_path)],
        "so there is nothing to test on": ["--checkpoint", "none", "--dataset", "folder"],
    }.items():
        with pytest.raises(data.BadInput, match=words):
            command(tiny, *(UNTRAINED[2:] if "none" in more else []), *more)
    (tmp_path / "checkpoint.pt").write_bytes(b"rubbish")
    with pytest.raises(data.BadInput, match="damaged or no checkpoint"):
        command(tiny, "--checkpoint", str(tmp_path))
