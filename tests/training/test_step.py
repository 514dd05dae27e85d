"""A step of training: its mathematics against the formulas."""

import copy
import math

import pytest
import torch
from helpers.training import fake_clips, settings
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import data
import goca
import model
import pretrain
from support.optim import LARS, learning_rate, step_if_finite


def test_lars_by_hand():
    w = nn.Parameter(torch.tensor([[3.0, 4.0]]))  # |w| = 5
    b = nn.Parameter(torch.tensor([1.0]))
    lars = LARS([w, b], lr=2.0, momentum=0.5, weight_decay=0.1, trust=0.01)
    w.grad, b.grad = torch.tensor([[0.0, 1.0]]), torch.tensor([0.25])
    lars.step()
    g = torch.tensor([[0.3, 1.4]])  # gradient + decay
    first = 0.01 * 5 / g.norm() * g
    torch.testing.assert_close(w.data, torch.tensor([[3.0, 4.0]]) - 2 * first)
    torch.testing.assert_close(b.data, torch.tensor([0.5]))  # plain SGD: no decay, no scaling
    w.grad, b.grad = torch.zeros(1, 2), torch.zeros(1)
    before = w.data.clone()
    lars.step()
    decay = 0.01 * before.norm() / (0.1 * before).norm() * 0.1 * before
    torch.testing.assert_close(w.data, before - 2 * (0.5 * first + decay))
    torch.testing.assert_close(b.data, torch.tensor([0.25]))  # momentum alone


def test_learning_rate_of_the_paper():
    s = pretrain.arguments(["--videos", "v", "--flow", "f", "--prototypes", "p", "--out", "o", "--batch-size", "640"])
    rate = [learning_rate(t, 14, s) for t in range(500 * 14)]
    assert rate[0] == pytest.approx(0.3) and rate[140] == pytest.approx(4.8) and rate[-1] == pytest.approx(0.0048)
    assert rate[70] == pytest.approx((0.3 + 4.8) / 2)
    middle = rate[140 + (7000 - 140) // 2]
    assert middle == pytest.approx((4.8 + 0.0048) / 2, rel=1e-3)


def test_learning_rate_follows_the_root_of_the_batch():
    for batch, rate in ((640, 4.8), (160, 2.4), (10, 0.6)):
        s = pretrain.arguments(["--videos", "v", "--flow", "f", "--prototypes", "p", "--out", "o", "--batch-size",
                                str(batch)])
        assert s.lr == pytest.approx(rate) and s.lr_end == pytest.approx(rate / 1000)


@pytest.mark.parametrize("method", sorted(set(model.METHODS) - {"vicc"}))
def test_step_loss_is_the_methods_formula(method):
    s = settings(method=method, width=0.125, hidden=16, lambda1=0.05, lambda2=0.04)
    net = model.two_view(vars(s), torch.randn(12, 6))
    clips = fake_clips(4)
    loss, *_ = pretrain.step_loss(net, clips, s, (method == "goca",) * 2)
    scores = net.scores(net(clips)).detach()  # training mode: batch statistics, so the same features again
    plain = goca.assign(scores[:, :2], 0.05, impl="reference")
    if method == "goca":
        d = torch.stack([goca.assign(scores[0, :2], 0.05, log_prior=plain[1], lambda2=0.04, impl="reference"),
                         goca.assign(scores[1, :2], 0.05, log_prior=plain[0], lambda2=0.04, impl="reference")]).exp()
    else:
        d = plain.exp()
    assert scores.shape[0] == (1 if method == "avg" else 2)
    log_g = torch.log_softmax(scores / 0.1, -1)
    pairs = [(a, v) for a in range(2) for v in range(3) if a != v]
    expected = torch.stack([-(d[:, a] * log_g[:, v]).sum(-1).mean() for a, v in pairs]).mean()
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)


def test_vicc_predicts_each_assignment_from_all_other_crops():
    s = settings(method="vicc", width=0.125, hidden=16, lambda1=0.05)
    net = model.two_view(vars(s), torch.randn(12, 6))
    clips = fake_clips(4)
    loss, *_ = pretrain.step_loss(net, clips, s, (False, False), frozen="flow")
    scores = net.scores(net(clips)).detach()
    d, log_g = goca.assign(scores[:, :2], 0.05, impl="reference").exp(), torch.log_softmax(scores / 0.1, -1)
    terms = [-(d[g, a] * log_g[h, v]).sum(-1).mean() for g in range(2) for a in range(2) for h in range(2)
             for v in range(3) if (g, a) != (h, v)]
    assert len(terms) == 20
    torch.testing.assert_close(loss.detach(), torch.stack(terms).mean(), rtol=1e-4, atol=1e-5)
    loss.backward()
    moved = {view: sum(p.grad is not None and bool(p.grad.any()) for p in net.backbones[view].parameters())
             for view in model.VIEWS}
    assert moved["flow"] == 0 < moved["rgb"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gradients_are_right_in_the_default_precision(device):
    """In a block of S3D that sees 2 frames, as its last ones do on clips of 16, against float64."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    torch.manual_seed(1)  # no input of a ReLU so near 0 that rounding changes its side
    net, x = model.Inception(32, 16, 16, 24, 8, 16, 16), torch.randn(8, 32, 2, 5, 5)
    weight = torch.randn(8, 72, 2, 5, 5)
    exact, net = copy.deepcopy(net).double(), net.to(device, memory_format=torch.channels_last_3d)
    with model.precision(torch.device(device)):
        out = net(x.to(device, memory_format=torch.channels_last_3d))
    (out * weight.to(device)).sum().backward()
    (exact(x.double()) * weight).sum().backward()
    for (name, a), b in zip(exact.named_parameters(), net.parameters(), strict=True):
        error = (a.grad - b.grad.cpu()).norm() / a.grad.norm()
        assert a.ndim == 1 or error < (1e-3 if device == "cpu" else 0.2), f"{name}: {error}"


def test_vicc_views_take_turns():
    s = settings(method="vicc", alternate=3)
    assert [pretrain.schedule(epoch * 7, 7, s) for epoch in (0, 2, 3, 5, 6)] == [
        ((False, False), view) for view in ("flow", "flow", "rgb", "rgb", "flow")]


@pytest.mark.parametrize(("lead", "led"), [("flow", (True, False)), ("rgb", (False, True)), ("none", (True, True))])
def test_the_leader_s_own_prior_is_off_while_it_leads(lead, led):
    s = settings(lead=lead, lead_epochs=3, guide_start=1)
    assert [pretrain.schedule(epoch * 7 + 6, 7, s)[0] for epoch in range(5)] == [
        (False, False), led, led, (True, True), (True, True)]
    assert pretrain.schedule(0, 7, settings())[0] == (True, True)  # the paper
    assert pretrain.schedule(0, 7, settings(method="sep", lead=lead, lead_epochs=3))[0] == (False, False)


@pytest.mark.parametrize("prior_views", [(True, False), (False, True)])
def test_a_led_step_s_loss_is_the_formula(prior_views):
    """The leader is assigned by Eq. 5, the led view by Eq. 6 with the leader's assignment as its prior."""
    s = settings(width=0.125, hidden=16, lambda1=0.05, lambda2=0.04)
    net, clips = model.two_view(vars(s), torch.randn(12, 6)), fake_clips(4)
    loss, batch_scores, _, scores = pretrain.step_loss(net, clips, s, prior_views)
    plain = goca.assign(scores[:, :2], 0.05, impl="reference")
    led = 0 if prior_views[0] else 1
    log_d = plain.clone()
    log_d[led] = goca.assign(scores[led, :2], 0.05, log_prior=plain[1 - led], lambda2=0.04, impl="reference")
    torch.testing.assert_close(loss.detach(), goca.swapped_loss(scores, log_d, impl="reference"))
    logged = pretrain.assign(batch_scores, s, prior_views)
    torch.testing.assert_close(logged.exp(), log_d.exp(), rtol=1e-4, atol=1e-5)
    by_view = pretrain.loss_by_view(scores, logged, s, None)
    for g, view in enumerate(model.VIEWS):
        expected = goca.swapped_loss(scores[g:g + 1], log_d[g:g + 1], impl="reference")
        assert by_view[f"loss_{view}"] == pytest.approx(expected.item(), rel=1e-4)


def test_two_heads_are_two():
    net = model.two_view({**vars(settings(width=0.125, hidden=16)), "heads": 2}, torch.randn(12, 6))
    assert len(net.heads) == 2


def test_recomputing_activations_changes_nothing_but_memory():
    s = settings(width=0.125, hidden=16)
    nets = [model.two_view(vars(s), torch.randn(12, 6, generator=torch.Generator().manual_seed(0))) for _ in range(2)]
    for backbone in nets[1].backbones.values():
        backbone.recompute = True
    clips = fake_clips(4)
    for net in nets:
        pretrain.step_loss(net, clips, s, (True, True))[0].backward()
    for (name, a), b in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)
    for (name, a), b in zip(nets[0].named_buffers(), nets[1].buffers(), strict=True):
        if "num_batches" not in name:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_prior_sign_reaches_the_assignment():
    scores = torch.randn(2, 2, 6, 5).tanh()
    plus, minus = (pretrain.assign(scores, settings(prior_sign=p), (True, True)) for p in (1, -1))
    plain = pretrain.assign(scores, settings(), (False, False))
    assert not torch.allclose(plus, minus)
    overlap = lambda d: (d.exp() * plain.flip(0).exp()).sum()  # noqa: E731  with the other view's assignment
    assert overlap(minus) < overlap(plain) < overlap(plus)


def test_sview_views_do_not_touch_each_other():
    s = settings(method="sview", width=0.125, hidden=16)
    net = model.two_view(vars(s), torch.randn(12, 6))
    clips = fake_clips(4)
    loss, *_ = pretrain.step_loss(net, clips, s, (False, False))
    loss.backward()
    grads = [p.grad.clone() for p in net.backbones["rgb"].parameters()]
    net.zero_grad()
    for c in clips:
        c["flow"] = c["flow"] * 3 + 1
    pretrain.step_loss(net, clips, s, (False, False))[0].backward()
    for a, p in zip(grads, net.backbones["rgb"].parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-3, atol=1e-6)


def test_describe_by_hand():
    """Crops and views agree unlike each other, and every crop and view has another spectrum."""
    top = torch.tensor([[[0, 1, 2, 0], [0, 1, 2, 1]], [[0, 1, 0, 1], [0, 0, 1, 2]]])  # [2 views, 2 crops, 4 samples]
    log_d = (0.03 + 0.9 * torch.nn.functional.one_hot(top, 4)).div(1.02).log()
    e = torch.eye(4)
    features = torch.stack([torch.stack([e[[0, 0, 0, 0]], e[[0, 0, 1, 1]]]), torch.stack([e, e])])
    out = pretrain.describe(log_d, features)
    assert out["prototypes_in_use"] == 3  # the fourth never is the first choice
    assert out["crops_agree"] == (3 + 1) / 8 and out["views_agree"] == (2 + 1) / 8
    p = [0.93 / 1.02] + 3 * [0.03 / 1.02]
    assert out["entropy"] == pytest.approx(-sum(x * math.log(x) for x in p))
    # the poorer view has six times the one feature and twice the other, in both crops together
    assert out["rank"] == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert out["effective_rank_rgb"] == out["rank"] and out["effective_rank_flow"] == pytest.approx(4)
    assert (out["prototypes_in_use_rgb"], out["prototypes_in_use_flow"]) == (3, 3)
    assert out["entropy_rgb"] == pytest.approx(out["entropy"]) == out["entropy_flow"]
    out = pretrain.describe(torch.full((2, 2, 4, 7), -math.log(7)), torch.ones(2, 2, 4, 4))
    assert out["entropy"] == pytest.approx(math.log(7)) and out["rank"] == pytest.approx(1)


@pytest.mark.parametrize("method", sorted(model.METHODS))
def test_nothing_in_a_step_asks_for_a_value(method, monkeypatch):
    """For which a GPU would keep the host waiting. Fake tensors have none, and refuse."""
    s = settings(method=method, arch="r2plus1d18", width=0.125, hidden=16)
    monkeypatch.setattr(data, "_constant", data._constant.__wrapped__)  # keeps none of them
    with FakeTensorMode():
        net = model.two_view(vars(s), torch.randn(24, 16)).train()
        optimizer = pretrain.make_optimizer(net, s)
        batch = {view: torch.zeros(8, 8, 32, 32, c, dtype=torch.uint8) for view, c in model.CHANNELS.items()}
        clips = {view: torch.empty(8, c, 8, 32, 32, memory_format=torch.channels_last_3d)
                 for view, c in model.CHANNELS.items()}
        data._augment_in_torch({**batch, "params": torch.zeros(8, 6)}, clips)
        clips = [{view: x.unflatten(0, (4, 2)) for view, x in clips.items()}]
        frozen = "flow" if method == "vicc" else None
        loss, *_ = pretrain.step_loss(net, clips, s, (method == "goca",) * 2, frozen)
        loss.backward()
        finite = step_if_finite(optimizer)
        net.renormalise(finite)
        statistics = model.BatchNormStatistics(net)
        statistics.undo_unless(statistics.read(), finite)
        with pytest.raises(DataDependentOutputException):
            float(finite)
