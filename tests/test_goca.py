"""goca.py against closed forms, the paper's own optimality conditions, SwAV's loop and POT; the contract's errors.

What is mathematics runs on both implementations (the compiled one where it is built); the compiled operator's own tests
are in test_operator.py.
"""

import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch

import goca

DOUBLE = torch.float64
IMPLS = ["reference", pytest.param("compiled", marks=pytest.mark.skipif(
    goca._goca is None, reason=f"the extension isn't built: {goca.BUILD}"))]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def unit_scores(*shape, n=20, d=16, seed=0, dtype=DOUBLE):
    """Cosines [*shape, n] of random unit features and prototypes, as the method has them."""
    g = torch.Generator().manual_seed(seed)
    f = torch.nn.functional.normalize(torch.randn(*shape, d, dtype=DOUBLE, generator=g), dim=-1)
    p = torch.nn.functional.normalize(torch.randn(n, d, dtype=DOUBLE, generator=g), dim=-1)
    return (f @ p.T).to(dtype)


def converged(scores, impl, **kwargs):
    return goca.assign(scores, iters=1000, impl=impl, **kwargs)


# ---------------------------------------------------------------------------------------------------------------------
# Closed forms
# ---------------------------------------------------------------------------------------------------------------------
def test_two_by_two_by_hand(impl):
    # K = [[e, 1], [1, e]] is symmetric, so one round gives both marginals: D = K / (1 + e) row by row.
    d = goca.assign(torch.eye(2, dtype=DOUBLE), lambda1=1.0, iters=1, impl=impl).exp()
    a, b = math.e / (1 + math.e), 1 / (1 + math.e)
    torch.testing.assert_close(d, torch.tensor([[a, b], [b, a]], dtype=DOUBLE))


def test_one_round_by_hand_takes_prototypes_first(impl):
    # exp(S) = [[1, 2], [3, 4]]: columns first [[1/4, 1/3], [3/4, 2/3]], then rows [[3/7, 4/7], [9/17, 8/17]].
    # Rows first would give [[8/15, 7/16 ...]]: another matrix, since its columns would be exact and its rows not.
    s = torch.tensor([[1.0, 2], [3, 4]], dtype=DOUBLE).log()
    d = goca.assign(s, lambda1=1.0, iters=1, impl=impl).exp()
    torch.testing.assert_close(d, torch.tensor([[3 / 7, 4 / 7], [9 / 17, 8 / 17]], dtype=DOUBLE))


def test_equal_scores_give_the_uniform_assignment(impl):
    log_d = goca.assign(torch.full((5, 7), 0.3, dtype=DOUBLE), impl=impl)
    torch.testing.assert_close(log_d, torch.full((5, 7), -math.log(7), dtype=DOUBLE))


def test_strong_scores_force_a_permutation(impl):
    order = torch.tensor([2, 0, 3, 1])
    d = goca.assign(torch.eye(4, dtype=DOUBLE)[order], lambda1=0.005, impl=impl).exp()
    torch.testing.assert_close(d, torch.eye(4, dtype=DOUBLE)[order])


def test_column_offsets_of_scores_and_prior_vanish(impl):
    # A column offset vanishes in the first half round, a constant everywhere.
    s = unit_scores(6)
    prior = torch.log_softmax(unit_scores(6, seed=1) / 0.05, -1)
    base = goca.assign(s, log_prior=prior, impl=impl)
    columns = torch.linspace(-1, 1, 20, dtype=DOUBLE)
    torch.testing.assert_close(goca.assign(s + 0.1 * columns + 0.3, log_prior=prior + columns, impl=impl), base)


def test_a_maximum_taken_off_each_sample_changes_three_rounds(impl):
    # The trap: it cancels at convergence, but not before, as the samples' weights in the first column sums differ.
    s = unit_scores(12)
    shifted = s - s.amax(-1, keepdim=True)
    three = goca.assign(s, impl=impl).exp() - goca.assign(shifted, impl=impl).exp()
    assert three.abs().max() > 1e-3
    torch.testing.assert_close(converged(s, impl, lambda1=0.2), converged(shifted, impl, lambda1=0.2))


def test_uniform_prior_is_a_larger_lambda1(impl):
    s = unit_scores(9)
    uniform = torch.full_like(s, -math.log(20))
    torch.testing.assert_close(goca.assign(s, 0.02, log_prior=uniform, lambda2=0.03, impl=impl),
                               goca.assign(s, 0.05, impl=impl))


def test_lambda2_zero_is_unguided(impl):
    s = unit_scores(2, 2, 9)
    torch.testing.assert_close(goca.guided_assign(s, 0.02, 0.0, impl=impl), goca.assign(s, 0.02, impl=impl))


def test_loss_by_hand(impl):
    # tau = 1, one sample, two prototypes, scores log g: the loss is the cross entropy itself. Crop 0 assigns, so only
    # crops 1 and 2 predict.
    g = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.9, 0.1]], dtype=DOUBLE)
    d = torch.tensor([0.2, 0.8], dtype=DOUBLE)
    loss = goca.swapped_loss(g.log().view(1, 3, 1, 2), d.log().view(1, 1, 1, 2), temperature=1.0, impl=impl)
    by_hand = -(0.2 * math.log(0.25) + 0.8 * math.log(0.75) + 0.2 * math.log(0.9) + 0.8 * math.log(0.1)) / 2
    assert float(loss) == pytest.approx(by_hand, rel=1e-12)


def test_loss_of_blind_predictions_is_ln_n(impl):
    # A collapsed network predicts alike for all prototypes: the loss is ln N whatever the assignment.
    targets = goca.assign(unit_scores(2, 2, 7), impl=impl)
    loss = goca.swapped_loss(torch.zeros(2, 5, 7, 20, dtype=DOUBLE), targets, impl=impl)
    assert float(loss) == pytest.approx(math.log(20), rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Independent oracles
# ---------------------------------------------------------------------------------------------------------------------
def swav(log_q, rounds):
    """SwAV's loop in the exp domain: one global maximum off, prototypes to 1/K, samples to 1/B, B off at the end."""
    q = (log_q - log_q.max()).exp().T  # [K, B] as there
    k, b = q.shape
    q = q / q.sum()
    for _ in range(rounds):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


@pytest.mark.parametrize("rounds", [1, 3])
def test_swav_rounds(impl, rounds):
    s = unit_scores(2, 33, n=50)
    d = goca.assign(s, 0.05, iters=rounds, impl=impl).exp()
    for view in range(2):
        torch.testing.assert_close(d[view], swav(s[view] / 0.05, rounds), rtol=1e-10, atol=1e-14)


def test_guided_is_swav_with_eq_10(impl):
    rgb, flow = unit_scores(2, 33, n=50)
    d_rgb, d_flow = goca.guided_assign(torch.stack([rgb, flow]).unsqueeze(1), 0.04, 0.06, impl=impl).exp().squeeze(1)
    prior_rgb, prior_flow = swav(rgb / 0.04, 3), swav(flow / 0.04, 3)
    torch.testing.assert_close(d_rgb, swav((rgb + 0.06 * prior_flow.log()) / 0.1, 3), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(d_flow, swav((flow + 0.06 * prior_rgb.log()) / 0.1, 3), rtol=1e-9, atol=1e-14)


def test_eq_6_is_optimal_at_convergence(impl):
    s, lambda1, lambda2 = unit_scores(8, n=12), 0.1, 0.15
    log_prior = goca.assign(unit_scores(8, n=12, seed=1), lambda1, impl=impl)
    m, n = s.shape
    log_d = converged(s, impl, lambda1=lambda1, log_prior=log_prior, lambda2=lambda2) - math.log(m)
    d = log_d.exp()
    torch.testing.assert_close(d.sum(1), torch.full((m,), 1 / m, dtype=DOUBLE))  # D lies in U (Eq. 4)
    torch.testing.assert_close(d.sum(0), torch.full((n,), 1 / n, dtype=DOUBLE))

    # The gradient of Eq. 6 is of the form a_i + b_j, so it is orthogonal to every direction within U.
    gradient = -s + (lambda1 + lambda2) * (log_d + 1) - lambda2 * (log_prior - math.log(m))
    centred = gradient - gradient.mean(0) - gradient.mean(1, keepdim=True) + gradient.mean()
    assert centred.abs().max() < 1e-10

    def objective(x):  # Eq. 6 as printed, with <D, C>, -lambda1 h(D) and lambda2 KL(D | D')
        return (x * -s).sum() + lambda1 * (x * x.log()).sum() + lambda2 * (x * (x / log_prior.exp() * m).log()).sum()

    g = torch.Generator().manual_seed(2)
    for _ in range(20):
        step = torch.randn(m, n, dtype=DOUBLE, generator=g)
        step = step - step.mean(0) - step.mean(1, keepdim=True) + step.mean()  # rows and columns sum to 0
        step = step * 0.5 * (d / step.abs()).min()  # stays positive
        assert objective(d + step) > objective(d)


def test_exact_oracle(impl):
    # At convergence the factors of D' are absorbed: OAP(S, D'(T)) is Sinkhorn of (S + (l2 / l1) T) / (l1 + l2).
    s, lambda1, lambda2 = unit_scores(2, 1, 10, n=15), 0.2, 0.3
    guided = goca.guided_assign(s, lambda1, lambda2, iters=1000, impl=impl)
    oracle = converged((s + lambda2 / lambda1 * s.flip(0)) / (lambda1 + lambda2), impl, lambda1=1.0)
    torch.testing.assert_close(guided, oracle, rtol=1e-9, atol=1e-9)


def test_pot_is_an_independent_oracle(impl):
    ot = pytest.importorskip("ot", reason="POT is a test dependency: pip install POT")
    s, lambda1, lambda2 = unit_scores(8, n=12), 0.1, 0.15
    log_prior = goca.assign(unit_scores(8, n=12, seed=1), lambda1, impl=impl)
    ours = converged(s, impl, lambda1=lambda1, log_prior=log_prior, lambda2=lambda2).exp() / 8
    theirs = ot.sinkhorn(torch.full((8,), 1 / 8, dtype=DOUBLE).numpy(), torch.full((12,), 1 / 12, dtype=DOUBLE).numpy(),
                         -(s + lambda2 * log_prior).numpy(), reg=lambda1 + lambda2, method="sinkhorn_log",
                         numItermax=20000, stopThr=1e-14)
    torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Behaviour
# ---------------------------------------------------------------------------------------------------------------------
def test_raising_lambda2_moves_towards_the_prior(impl):
    s = unit_scores(16)
    log_prior = goca.assign(unit_scores(16, seed=1), 0.05, impl=impl)

    def kl(lambda2, sign):  # of the assignment from the prior, mean over samples
        log_d = goca.assign(s, 0.05, log_prior=log_prior, lambda2=lambda2, prior_sign=sign, iters=200, impl=impl)
        return float((log_d.exp() * (log_d - log_prior)).sum(-1).mean())

    towards = [kl(x, +1) for x in (0.0, 0.02, 0.05, 0.2, 2.0)]
    assert towards == sorted(towards, reverse=True) and towards[-1] < 0.01 * towards[0]
    assert kl(0.02, -1) > towards[0]


@pytest.mark.parametrize("prior_views", [(True, True), (True, False), (False, True), (False, False)])
def test_each_view_with_and_without_a_prior(impl, prior_views):
    s = unit_scores(2, 2, 17)
    unguided = goca.assign(s, 0.05, impl="reference")
    guided = goca.assign(s, 0.05, log_prior=unguided.flip(0), lambda2=0.04, impl="reference")
    expected = torch.stack([guided[g] if prior_views[g] else unguided[g] for g in (0, 1)])
    assert (guided - unguided).abs().amax() > 1, "degenerate: the prior would change nothing"
    torch.testing.assert_close(goca.guided_assign(s, 0.05, 0.04, impl=impl, prior_views=prior_views), expected)
    scores = torch.cat([s, unit_scores(2, 3, 17, seed=1)], 1).requires_grad_()
    fused = goca.guided_loss(scores, lambda1=0.05, lambda2=0.04, impl=impl, prior_views=list(prior_views))
    apart = goca.swapped_loss(scores, expected, impl="reference")
    torch.testing.assert_close(fused, apart)
    torch.testing.assert_close(*(torch.autograd.grad(x, scores)[0] for x in (fused, apart)))


def test_the_leaders_assignment_holds_nothing_of_the_other_view(impl):
    s = unit_scores(2, 2, 17)
    other = torch.stack([unit_scores(2, 17, seed=1), s[1]])  # another rgb, as confident as the first
    for prior_views, moves in (((True, False), False), ((True, True), True)):
        a, b = (goca.guided_assign(x, impl=impl, prior_views=prior_views)[1] for x in (s, other))
        assert bool((a - b).abs().amax() > 1) == moves and (moves or torch.equal(a, b))


def test_lambda2_of_zero_is_no_prior(impl):
    s = unit_scores(2, 2, 17)
    torch.testing.assert_close(goca.guided_assign(s, 0.05, 0.0, impl=impl),
                               goca.guided_assign(s, 0.05, 0.03, impl=impl, prior_views=(False, False)))


def test_permutation_equivariance(impl):
    s = unit_scores(2, 2, 11)
    g = torch.Generator().manual_seed(3)
    rows, columns = torch.randperm(11, generator=g), torch.randperm(20, generator=g)
    torch.testing.assert_close(goca.guided_assign(s[:, :, rows][..., columns], impl=impl),
                               goca.guided_assign(s, impl=impl)[:, :, rows][..., columns])


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("lambda1", [0.02, 0.005, 0.001])
def test_small_lambda_stays_finite(impl, lambda1, dtype):
    s = torch.cat([unit_scores(2, 2, 15), -unit_scores(2, 2, 1).abs()], 2).to(dtype)  # and a sample far from everything
    s[..., 0, 0], s[..., 1, 1] = 1.0, -1.0
    for log_d in (goca.assign(s, lambda1, impl=impl), goca.guided_assign(s, lambda1, 0.03, impl=impl),
                  goca.guided_assign(s, lambda1, lambda1, iters=50, impl=impl)):
        assert log_d.isfinite().all()
        torch.testing.assert_close(log_d.exp().sum(-1), torch.ones_like(log_d[..., 0]), rtol=0, atol=2e-4)


def test_samples_are_exact_and_prototypes_only_in_the_limit(impl):
    def uneven(iters):  # the largest relative error of the prototypes' marginal
        d = goca.assign(unit_scores(200), 0.05, iters=iters, impl=impl).exp()
        torch.testing.assert_close(d.sum(-1), torch.ones(200, dtype=DOUBLE))  # samples come last
        return float((d.sum(0) / 200 * 20 - 1).abs().max())

    assert uneven(1) > uneven(3) > uneven(30) > uneven(500)
    assert uneven(3) > 0.01 and uneven(500) < 1e-9


def test_gradients(impl):
    scores = unit_scores(2, 3, 2, n=4).requires_grad_()
    targets = goca.assign(unit_scores(2, 2, 2, n=4, seed=1), impl=impl)
    whole = unit_scores(2, 2, 7, n=4, seed=2)  # the assignment is fixed, as no gradient flows through D
    for loss in (partial(goca.swapped_loss, log_targets=targets, impl=impl),
                 partial(goca.swapped_loss, log_targets=targets[:, :1] - 0.7, impl=impl),  # rows that sum to a half
                 partial(goca.guided_loss, batch_scores=whole, first_row=3, impl=impl)):
        assert torch.autograd.gradcheck(loss, scores)
        assert torch.autograd.gradgradcheck(loss, scores)  # second derivatives, and those by the outer gradient

        def penalty(x, loss=loss):  # third derivatives
            return torch.autograd.grad(loss(x), x, create_graph=True)[0].square().sum()

        assert torch.autograd.gradgradcheck(penalty, scores)


def test_no_gradient_flows_through_the_assignment(impl):
    scores = unit_scores(2, 3, 6).requires_grad_()
    assert not goca.assign(scores, impl=impl).requires_grad and not goca.guided_assign(scores, impl=impl).requires_grad
    fused = torch.autograd.grad(goca.guided_loss(scores, impl=impl), scores)[0]
    with torch.no_grad():
        log_d = goca.guided_assign(scores[:, :2], impl=impl)
    apart = torch.autograd.grad(goca.swapped_loss(scores, log_d, impl=impl), scores)[0]
    torch.testing.assert_close(fused, apart)
    targets = log_d.clone().requires_grad_()
    assert torch.autograd.grad(goca.swapped_loss(scores, targets, impl=impl), targets, allow_unused=True)[0] is None


def test_batch_scores_give_each_part_its_share(impl):
    # Two processes with 5 and 2 of 7 samples: mean losses weighted by their samples are the loss of the whole batch.
    scores = unit_scores(2, 4, 7).requires_grad_()
    whole = goca.guided_loss(scores, impl=impl)
    parts = [goca.guided_loss(scores[:, :, a:b], batch_scores=scores[:, :2], first_row=a, impl=impl) * (b - a) / 7
             for a, b in ((0, 5), (5, 7))]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), scores)[0], torch.autograd.grad(whole, scores)[0])


def test_dtypes_autocast_and_strides(impl):
    s = unit_scores(2, 3, 6)
    exact = goca.guided_assign(s, impl=impl)
    for dtype, out in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)):
        low = s.to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            log_d = goca.guided_assign(low, impl=impl)
            loss = goca.guided_loss(low.requires_grad_(), impl=impl)
        assert log_d.dtype == loss.dtype == out
        torch.testing.assert_close(log_d.exp(), goca.guided_assign(low.double(), impl=impl).exp().float(),
                                   rtol=0, atol=1e-5)  # widened first: only the rounding of the input is lost
        loss.backward()
        assert low.grad.dtype == dtype
    strided = torch.empty(6, 20, 3, 2, dtype=DOUBLE).permute(3, 2, 0, 1).copy_(s)
    torch.testing.assert_close(goca.guided_assign(strided, impl=impl), exact)
    torch.testing.assert_close(goca.assign(s[1, ::2, 1::2, ::3], impl=impl),
                               goca.assign(s[1, ::2, 1::2, ::3].contiguous(), impl=impl))
    assert goca.assign(s[0, 0], impl=impl).shape == (6, 20) and goca.assign(s[None], impl=impl).shape == (1, *s.shape)


# ---------------------------------------------------------------------------------------------------------------------
# The contract's errors
# ---------------------------------------------------------------------------------------------------------------------
S = unit_scores(2, 3, 4, n=5)
T = torch.log_softmax(unit_scores(2, 2, 4, n=5, seed=1), -1)
NAN, INF, W = S * math.nan, (S * 0).log(), S[:, :2]
ALL = (goca.assign, goca.guided_assign, goca.guided_loss)
BAD = {  # name of the argument that the message must begin with -> calls
    "scores": [
        *(partial(f, x) for f in (*ALL, partial(goca.swapped_loss, log_targets=T))
          for x in (None, [[1.0]], S.long(), S.to(torch.complex64), S.to_sparse(), S[:, :, :0], S[..., :0], S[:0], NAN,
                    INF)),
        partial(goca.assign, S[0, 0, 0]),
        *(partial(f, x) for f in ALL[1:] for x in (S[0], S[:1])),
        partial(goca.swapped_loss, S[0], T), partial(goca.swapped_loss, S[:, :1], T[:, :1]),
        partial(goca.guided_loss, S[:, :1], n_assign=1), partial(goca.guided_loss, S[:, :0]),
        *(partial(f, S.float() * 1e37, lambda1=0.02) for f in ALL), *(partial(f, S, lambda1=1e-308) for f in ALL),
        partial(goca.swapped_loss, -S.float() * 1e37, T.float(), 0.02),
        partial(goca.guided_loss, S, temperature=1e-308)],
    "log_prior": [partial(goca.assign, S, log_prior=x) for x in (0, S[0], S.float(), S.to("meta"), NAN, INF)],
    "log_targets": [partial(goca.swapped_loss, S, x) for x in (
        None, T[0], T[..., :4], T[:, :, :3], T[:1], T[:, :0], torch.cat([T, T], 1), T.float(), T.to("meta"),
        T * math.inf)],
    "batch_scores": [partial(goca.guided_loss, S, batch_scores=x) for x in (
        1, W[0], S, S[:1, :2], W[..., :4], W[:, :, :0], W.float(), W.to("meta"), NAN[:, :2])],
    "first_row": [
        partial(goca.guided_loss, S, first_row=1), partial(goca.guided_loss, S, batch_scores=W[:, :, :2]),
        *(partial(goca.guided_loss, S, batch_scores=W, first_row=x) for x in (1, -1, 0.0))],
    "n_assign": [partial(goca.guided_loss, S, n_assign=x) for x in (0, 4, 1.0, True)],
    "lambda1": [partial(f, S, lambda1=x) for f in ALL for x in (0, -0.02, math.nan, math.inf, "a", True, np.True_,
                                                                   np.float32("nan"))],
    "lambda2": [partial(f, S, lambda2=x) for f in ALL for x in (-0.01, math.nan, math.inf, None)],
    "iters": [partial(f, S, iters=x) for f in ALL for x in (0, -1, 2.5, True, np.float32(3), np.int64(0), np.True_)],
    "prior_sign": [partial(f, S, prior_sign=x) for f in ALL for x in (0, 2, None)],
    "prior_views": [partial(f, S, prior_views=x) for f in ALL[1:]
                    for x in (None, True, "rgb", ("rgb", "flow"), (True,), (True, True, True), (1, 0), torch.ones(2))],
    "temperature": [partial(f, temperature=x) for f in (partial(goca.swapped_loss, S, T), partial(goca.guided_loss, S))
                    for x in (0, -0.1, math.nan, None)],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_named(impl, name):
    for call in BAD[name]:
        with pytest.raises(ValueError, match=rf"^{name} must .*(got|infinite)"):
            call(impl=impl)


def test_numbers_of_numpy_are_numbers(impl):
    given = {"lambda1": np.float32(0.02), "lambda2": np.float64(0.03), "iters": np.int64(3), "prior_sign": np.int8(1)}
    plain = {name: value.item() for name, value in given.items()}
    for f in ALL:
        torch.testing.assert_close(f(S, impl=impl, **given), f(S, impl=impl, **plain))
    torch.testing.assert_close(goca.swapped_loss(S, T, np.float16(0.5), impl=impl),
                               goca.swapped_loss(S, T, 0.5, impl=impl))
    part = partial(goca.guided_loss, S[:, :, 1:], batch_scores=W, impl=impl)
    torch.testing.assert_close(part(n_assign=np.int32(2), first_row=np.int64(1)), part(n_assign=2, first_row=1))


def test_bad_impl():
    for call in (*ALL, partial(goca.swapped_loss, log_targets=T)):
        with pytest.raises(ValueError, match=r"^impl must be"):
            call(S, impl="fast")


def test_check_finite_off_lets_nan_through(impl):
    # Off in the training loop, where a NaN must show in the loss and not be hidden.
    bad = S.clone()
    bad[0, 0, 0, 0] = math.nan
    assert goca.guided_loss(bad, impl=impl, check_finite=False).isnan()
    assert goca.assign(bad[0, 0], impl=impl, check_finite=False).isnan().any()


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(goca, "_goca", None)
    monkeypatch.setattr(goca, "_MISSING", "the compiled operator isn't built", raising=False)
    monkeypatch.setattr(goca, "_warned", set())
    with pytest.raises(RuntimeError, match=r"python setup\.py build_ext --inplace"):
        goca.assign(S, impl="compiled")
    with pytest.warns(UserWarning, match="isn't built; the PyTorch reference is used"):
        log_d = goca.assign(S)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        torch.testing.assert_close(goca.assign(S), log_d)
        assert goca.implementation("cpu") == "reference"


@pytest.mark.skipif(goca._goca is None, reason="the extension is not built")
def test_which_implementation_a_device_gets(monkeypatch):
    monkeypatch.setattr(goca, "_warned", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert goca.implementation("cpu") == goca.implementation(torch.device("cpu")) == "compiled"
    if not goca._goca.cuda:
        with pytest.warns(UserWarning, match="without its CUDA kernels; the PyTorch reference is used"):
            assert goca.implementation("cuda") == "reference"
