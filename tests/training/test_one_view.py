"""pretrain.py --views: SwAV on RGB without flow, on flow without videos."""

import os
import signal

import numpy as np
import pytest
import torch
from helpers.clips import film, numbered
from helpers.flow import command as flow_command
from helpers.flow import film as flow_film
from helpers.flow import moving
from helpers.small_runs import SMALL, log_lines
from helpers.training import fake_clips, settings

import data
import model
import pretrain
from support import videos as videos_module
from support.checkpoints import load_checkpoint
from support.datasets import Video, read_split
from support.errors import BadInput
from support.stores import FlowStore


def inputs(tiny, view):
    """What a view is read from, and nothing else."""
    read = ["--videos", str(tiny.videos)] if view == "rgb" else ["--flow", str(tiny.flow)]
    return ["--dataset", "ucf101", "--splits", str(tiny.splits), "--prototypes", str(tiny.prototypes), *read, *SMALL,
            "--views", view]


def train(tiny, out, view, *more):
    return pretrain.train(pretrain.arguments([*inputs(tiny, view), "--out", str(out), *more]))


@pytest.fixture
def no_decoder(monkeypatch):
    monkeypatch.setattr(videos_module, "_open_decoder", lambda path: pytest.fail(f"{path} was opened"))


# --- clips -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("cache", [False, True])
def test_clips_of_one_view_are_those_of_both(tiny, cache):
    found, flows = read_split("ucf101", tiny.videos, tiny.splits).videos, FlowStore(tiny.flow)
    how = {"frames": 4, "short_frames": 3, "n_short": 1, "size": 24, "cache": cache}
    both = data.TrainClips(found, flows, **how)
    for view, store in (("rgb", None), ("flow", flows)):
        one = data.TrainClips(found, store, **how, views=(view,))
        for item in ((0, 0), (1, 7)):
            expected, alone = both[item], one[item]
            assert alone["fault"] == expected["fault"] == "" and alone["index"] == expected["index"]
            for kind in ("long", "short"):
                assert alone[kind].keys() == {view, "params"} and alone[kind][view].float().std() > 0
                assert all(torch.equal(x, expected[kind][k]) for k, x in alone[kind].items())
        assert one.item_bytes() / both.item_bytes() == model.CHANNELS[view] / 5


def test_augmented_clips_of_one_view_are_those_of_both(tiny):
    found, flows = read_split("ucf101", tiny.videos, tiny.splits).videos, FlowStore(tiny.flow)
    how, cpu = {"frames": 4, "n_short": 0, "size": 24}, torch.device("cpu")
    item = data.TrainClips(found, flows, **how)[(0, 2)]
    batch = {"long": {k: x[None] for k, x in item["long"].items()}}
    (expected,) = data.augment(batch, cpu)
    clips = {k: x.flatten(0, 1) for k, x in batch["long"].items()}
    for view in model.VIEWS:
        (alone,) = data.augment({"long": {k: batch["long"][k] for k in (view, "params")}}, cpu)
        assert alone.keys() == {view} and torch.equal(alone[view], expected[view])
        in_torch = {view: torch.empty_like(expected[view].flatten(0, 1))}
        data._augment_in_torch({k: clips[k] for k in (view, "params")}, in_torch)
        both = {v: torch.empty_like(x.flatten(0, 1)) for v, x in expected.items()}
        data._augment_in_torch(clips, both)
        assert torch.equal(in_torch[view], both[view])


@pytest.mark.parametrize("declared", [40, 0])
@pytest.mark.parametrize("cache", [False, True])
def test_a_film_that_declares_other_frames_than_it_has(tmp_path, monkeypatch, declared, cache):
    """12 frames that say they are 40, or nothing: clips of what decodes, each frame the one after the one before."""
    path = film(tmp_path / "a.avi", numbered(12))
    monkeypatch.setattr(videos_module, "declared_frames", lambda path: declared)
    clips = data.TrainClips([Video(str(path), "a", -1)], None, frames=6, n_short=0, size=16, cache=cache,
                            views=("rgb",))
    starts = set()
    for epoch in range(12):
        item = clips[(epoch, 0)]
        assert item["fault"] == ""
        for clip in item["long"]["rgb"]:
            seen = [round(frame.float().mean().item() / 5) for frame in clip]
            assert seen == list(range(seen[0], seen[0] + 6)) and seen[-1] <= 10
            starts.add(seen[0])
    assert starts > {0, 5} and max(starts) == 5
    empty = tmp_path / "b.avi"
    empty.write_bytes(b"no film")
    with pytest.raises(BadInput, match=r"100 videos in a row.*b\.avi holds no frame that OpenCV can decode"):
        data.TrainClips([Video(str(empty), "b", -1)], None, frames=6, n_short=0, size=16, views=("rgb",))[(0, 0)]


def test_smaller_flow_alone_is_cut_at_the_place_in_the_film(tmp_path):
    """The film's size is in the header of its flow."""
    flow_film(tmp_path / "v" / "a.avi", moving(6, 36, 50, 1, 0))
    assert flow_command(tmp_path / "v", tmp_path / "flow", "--short-side", "20") == 0
    videos, flows = read_split("folder", tmp_path / "v").videos, FlowStore(tmp_path / "flow")
    assert flows.open("a").shape == (40, 28)
    both, alone = (data.TrainClips(videos, flows, frames=3, n_short=0, size=16, views=views)
                   for views in (model.VIEWS, ("flow",)))
    for epoch in range(4):
        expected = both[(epoch, 0)]["long"]["flow"]
        assert torch.equal(alone[(epoch, 0)]["long"]["flow"], expected) and expected.float().std() > 1
    views = [data.TestClips(videos, flows, frames=3, size=16, views=views)[0] for views in (model.VIEWS, ("flow",))]
    assert torch.equal(views[0]["flow"], views[1]["flow"]) and "rgb" not in views[1]


# --- the step --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("view", model.VIEWS)
def test_a_step_of_one_view_is_that_view_s_part_of_two_networks(view):
    """Method sview trains both views, each by itself: with its weights, one view alone has its loss and gradient."""
    both = settings(method="sview", width=0.125, hidden=16)
    alone = settings(method="sview", width=0.125, hidden=16, views=[view])
    prototypes, clips, g = torch.randn(12, 6), fake_clips(4), model.VIEWS.index(view)
    two, one = model.two_view(vars(both), prototypes), model.two_view(vars(alone), prototypes)
    assert list(one.backbones) == [view] and len(one.heads) == 1 and len(two.heads) == 2
    one.backbones.load_state_dict({k: x for k, x in two.backbones.state_dict().items() if k.startswith(view)})
    one.heads[0].load_state_dict(two.heads[g].state_dict())
    loss, batch_scores, features, scores = pretrain.step_loss(one, [{view: c[view]} for c in clips], alone,
                                                              (False, False))
    whole, whole_scores, _, own = pretrain.step_loss(two, clips, both, (False, False))
    parts = pretrain.loss_by_view(own, pretrain.assign(whole_scores, both, (False, False)), both, None)
    assert loss.item() == pytest.approx(parts[f"loss_{view}"], rel=1e-5)
    assert parts["loss_rgb"] != pytest.approx(parts["loss_flow"], rel=1e-4)
    loss.backward()
    (2 * whole).backward()
    ours, theirs = (torch.cat([p.grad.flatten() for p in net.backbones[view].parameters()]) for net in (one, two))
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    out = pretrain.describe(pretrain.assign(batch_scores, alone, (False, False)), features.detach())
    assert out["rank"] > 1 and "views_agree" not in out and features.shape[0] == scores.shape[0] == 1


# --- runs ------------------------------------------------------------------------------------------------------------
def test_rgb_trains_without_flow_and_continues(tiny, tmp_path, monkeypatch, capsys):
    """Stopped after each of the first steps, and not: the same weights."""
    monkeypatch.setattr(data, "open_views", lambda video, store, rgb: (store, rgb) if not store and not rgb else 1 / 0)
    assert train(tiny, tmp_path / "whole", "rgb") == 0
    said = capsys.readouterr().out
    assert "sview on ucf101" in said and "20 videos (0 listed but absent);" in said
    assert "one view, rgb of 2 crops" in said and "without flow" not in said
    state = load_checkpoint(tmp_path / "whole")
    assert state["settings"]["views"] == ["rgb"] and state["settings"]["method"] == "sview"
    assert state["settings"]["flow_header"] is None
    assert {k.split(".")[1] for k in state["model"] if k.startswith("backbones.")} == {"rgb"}
    lines = log_lines(tmp_path / "whole")
    assert [line["step"] for line in lines] == [3, 6, 9, 10] and all(0 < line["loss"] < 10 for line in lines)
    assert lines[0].keys() & {"views_agree", "loss_rgb"} == set() and lines[0]["rank"] >= 1

    real, count = pretrain.step_loss, iter(range(100))

    def interrupted(*args):
        if next(count) < 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(pretrain, "step_loss", interrupted)
    for status in (128 + signal.SIGTERM, 128 + signal.SIGTERM, 0):
        assert train(tiny, tmp_path / "parts", "rgb") == status
    again = load_checkpoint(tmp_path / "parts")["model"]
    assert all(torch.equal(x, again[k]) for k, x in state["model"].items())
    first = model.two_view(state["settings"], state["model"]["prototypes"]).state_dict()
    assert not torch.equal(first["heads.0.0.weight"], again["heads.0.0.weight"])
    with pytest.raises(BadInput, match=r"trained with other settings \(.*views \['rgb'\] -> \['rgb', 'flow'\]"):
        train(tiny, tmp_path / "whole", "rgb", "--flow", str(tiny.flow), "--views", "rgb", "flow")


def test_flow_trains_without_a_video(tiny, tmp_path, no_decoder, capsys):
    assert train(tiny, tmp_path / "run", "flow", "--epochs", "2") == 0
    said = capsys.readouterr().out
    assert f"sview on ucf101 in {tiny.flow}: 20 videos" in said and "0 without flow); one view, flow" in said
    state = load_checkpoint(tmp_path / "run")
    assert state["settings"]["flow_header"] == FlowStore(tiny.flow).header
    assert {k.split(".")[1] for k in state["model"] if k.startswith("backbones.")} == {"flow"}
    assert np.isfinite(log_lines(tmp_path / "run")[-1]["loss"])


def test_a_plan_of_one_view_writes_nothing(tiny, tmp_path, capsys):
    assert train(tiny, tmp_path / "run", "rgb", "--plan") == 0
    assert "one view, rgb of 2 crops" in (said := capsys.readouterr().out) and "a step takes" in said
    assert not (tmp_path / "run").exists()


def test_one_view_goes_on_from_a_run_of_both(tiny, tmp_path, capsys):
    more = [*inputs(tiny, "rgb")[:-2], "--flow", str(tiny.flow), "--epochs", "1"]
    assert pretrain.train(pretrain.arguments([*more, "--out", str(tmp_path / "both")])) == 0
    assert train(tiny, tmp_path / "one", "rgb", "--init", str(tmp_path / "both"), "--lr", "1e-12", "--epochs", "1",
                 "--weight-decay", "0") == 0
    assert "backbones taken over; projection head taken over" in capsys.readouterr().out
    before, after = load_checkpoint(tmp_path / "both")["model"], load_checkpoint(tmp_path / "one")["model"]
    name = "backbones.rgb.net.layers.0.0.weight"
    torch.testing.assert_close(before[name], after[name], rtol=1e-4, atol=1e-6)


# --- what doesn't fit ------------------------------------------------------------------------------------------------
BASE = ["--prototypes", "p", "--out", "o"]


@pytest.mark.parametrize(("more", "words"), [
    (["--videos", "v", "--views", "rgb", "--method", "goca"], "--method goca needs two views, for guiding takes the "
                                                              "other view's assignment as its prior .*--method sview"),
    (["--videos", "v", "--views", "rgb", "--method", "vicc"], "--method vicc needs two views, for each view predicts"),
    (["--flow", "f", "--views", "flow", "--method", "avg"], "--method avg needs two views, for it averages"),
    (["--videos", "v"], "--flow is missing: .*or take --views rgb"),
    (["--videos", "v", "--views", "flow"], "--flow is missing"),
    (["--flow", "f"], "--videos is missing: .*or take --views flow"),
    (["--flow", "f", "--views", "rgb"], "--videos is missing")])
def test_what_one_view_can_t_do_is_said(more, words):
    with pytest.raises(BadInput, match=words):
        pretrain.arguments([*BASE, *more])


def test_methods_and_views_by_default(capsys):
    both = pretrain.arguments([*BASE, "--videos", "v", "--flow", "f", "--views", "flow", "rgb"])
    assert (both.method, both.views) == ("goca", ["rgb", "flow"])
    one = pretrain.arguments([*BASE, "--flow", "f", "--views", "flow", "--rgb", "r"])
    assert (one.method, one.views) == ("sview", ["flow"])
    assert "note: --rgb r has no effect with --views flow" in capsys.readouterr().out


def test_a_store_without_the_listed_films_is_named(tiny, tmp_path):
    (tmp_path / "header.json").write_text((tiny.flow / "header.json").read_text())
    with pytest.raises(BadInput, match=r"holds no flow yet; run: python flow\.py"):
        train(tiny, tmp_path / "run", "flow", "--flow", str(tmp_path))
    (tmp_path / "other.avi").symlink_to(next(tiny.flow.rglob("*.avi")))
    with pytest.raises(BadInput, match=rf"none of the 20 videos of ucf101's train list is in {tmp_path}"):
        train(tiny, tmp_path / "run", "flow", "--flow", str(tmp_path))
