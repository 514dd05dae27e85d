"""A step with a gradient that is not finite changes nothing: not the weights, the optimizer or the batch norms."""

import copy

import pytest
import torch
from helpers.training import log, poisoned, run, weights

import model
from support.errors import BadInput
from support.optim import LARS, SGD, Adam, AdamW, check_weights, step_if_finite


@pytest.mark.parametrize("make", [lambda p: LARS(p, 0.5), lambda p: AdamW(p, 0.1, (0.9, 0.99), 0.1),
                                  lambda p: SGD(p, 0.5, 0.9, 0.1), lambda p: Adam(p, 0.1, 0.1)],
                         ids=["lars", "adamw", "sgd", "adam"])
def test_weights_and_momenta_keep_their_bits(make):
    net = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 2), torch.nn.BatchNorm3d(3)).to(
        memory_format=torch.channels_last_3d)
    optimizer = make(net.parameters())

    def step(poison=()):
        net(torch.randn(4, 2, 3, 3, 3)).square().sum().backward()
        for p in poison:
            p.grad[0] = float("inf")
        finite = step_if_finite(optimizer)
        optimizer.zero_grad()
        return bool(finite), [x.clone() for p in net.parameters() for x in (p.detach(), *optimizer.state[p].values())]

    for poison in ([net[0].weight], [net[1].bias], list(net.parameters())):  # of a first step, too
        before = [p.detach().clone() for p in net.parameters()]
        assert not step(poison)[0]
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    good, state = step()
    assert good and not torch.equal(before[0], net[0].weight)
    dropped, same = step([net[0].bias])
    assert not dropped and all(torch.equal(a, b) for a, b in zip(state, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(state, step()[1], strict=True))


@pytest.mark.parametrize("fused, plain", [
    (lambda p: SGD(p, 0.5, 0.9, 0.1), lambda p: torch.optim.SGD(p, 0.5, 0.9, weight_decay=0.1)),
    (lambda p: Adam(p, 0.1, 0.1), lambda p: torch.optim.Adam(p, 0.1, weight_decay=0.1))], ids=["sgd", "adam"])
def test_fused_optimizers_go_on_from_the_state_of_torch_s_own(fused, plain):
    w = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
    v = torch.nn.Parameter(w.detach().clone())
    one, other = plain([w]), fused([v])
    for step in range(4):
        w.grad, v.grad = torch.tensor([0.5, step]), torch.tensor([0.5, step])
        if step == 2:
            other.load_state_dict(copy.deepcopy(one.state_dict()))  # as from a file
        one.step(), step_if_finite(other)
        torch.testing.assert_close(v, w)
    assert other.param_groups[0]["fused"]


def test_running_statistics_go_back_to_those_of_the_last_good_step():
    norm = torch.nn.BatchNorm3d(3)
    statistics = model.BatchNormStatistics(norm)
    norm(torch.randn(4, 3, 2, 2, 2))
    good = statistics.undo_unless(statistics.read(), torch.tensor(True))
    held = [b.clone() for b in norm.buffers()]
    for _ in range(2):
        norm(torch.full((4, 3, 2, 2, 2), torch.nan))
        good = statistics.undo_unless(good, torch.tensor(False))
        assert all(torch.equal(a, b) for a, b in zip(held, norm.buffers(), strict=True))
    norm(torch.randn(4, 3, 2, 2, 2))
    statistics.undo_unless(good, torch.tensor(True))
    assert norm.num_batches_tracked == 2 and not torch.equal(held[0], norm.running_mean)


def test_a_run_with_a_bad_batch_saves_what_can_be_used(tiny, tmp_path, monkeypatch):
    poisoned(monkeypatch, {1, 3})  # the last step, too
    assert run(tiny, tmp_path / "run") == 0
    assert log(tmp_path / "run")[-1]["dropped"] == 2
    assert all(w.isfinite().all() for w in weights(tmp_path / "run").values())


def test_steps_of_several_batches_are_counted_as_steps(tiny, tmp_path, monkeypatch):
    """Every second batch is well, and no step."""
    poisoned(monkeypatch, set(range(1, 100, 2)))
    with pytest.raises(BadInput, match="not finite in the last 5 steps"):
        run(tiny, tmp_path / "run", "--epochs", "10", "--accumulate", "2", "--log-every", "1")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    net = torch.nn.BatchNorm3d(2)
    check_weights(net, 3, tmp_path / "checkpoint.pt")
    net.running_var[0] = torch.nan
    with pytest.raises(BadInput, match="step 3 is not saved: running_var not finite; nothing had been saved"):
        check_weights(net, 3, tmp_path / "checkpoint.pt")
