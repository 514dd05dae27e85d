"""The compiled operator (csrc/): equal to the reference in float64, deterministic, frugal, well-behaved in PyTorch.

The mathematics itself is tested, on both implementations, in test_goca.py. Tolerance on D in float32: 1e-5 at lambda
0.02/0.03, where S / lambda is up to 50, or 72 in base 2, rounded to 24 bits (4e-6 relative) for the own view and again
for the other.
"""

import re
import shutil
import subprocess
from functools import partial

import pytest
import torch
from helpers.paths import ROOT
from torch.library import opcheck

import goca

built = pytest.mark.skipif(goca._goca is None, reason=f"the extension isn't built: {goca.BUILD}")
DEVICES = [pytest.param("cpu", marks=built), pytest.param("cuda", marks=[built, pytest.mark.skipif(
    not torch.cuda.is_available() or goca._goca is None or not goca._goca.cuda,
    reason="no GPU, or the extension is built without CUDA kernels")])]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def unit_scores(*shape, n, d=32, seed=0, dtype=torch.float32, device="cpu"):
    """Cosines [*shape, n] of random unit features and prototypes; every fourth sample lies on a prototype."""
    g = torch.Generator().manual_seed(seed)
    p = torch.nn.functional.normalize(torch.randn(n, d, dtype=torch.float64, generator=g), dim=-1)
    f = torch.nn.functional.normalize(torch.randn(*shape, d, dtype=torch.float64, generator=g), dim=-1)
    f[..., ::4, :] = p[torch.randint(n, f[..., ::4, 0].shape, generator=g)]
    return (f @ p.T).to(device, dtype)


def reference(function, scores, **kwargs):
    """The reference in float64 on the CPU, of the same numbers."""
    kwargs = {k: v.double().cpu() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    return function(scores.detach().double().cpu(), impl="reference", **kwargs)


def assert_same_assignment(log_d, expected, atol):
    assert log_d.shape == expected.shape and log_d.is_contiguous() and not log_d.requires_grad
    torch.testing.assert_close(log_d.exp().double().cpu(), expected.exp(), rtol=0, atol=atol)


# ---------------------------------------------------------------------------------------------------------------------
# Equal to the reference
# ---------------------------------------------------------------------------------------------------------------------
PRIOR_VIEWS = [(True, True), (True, False), (False, True), (False, False)]
SIZES = [(1, 1), (1, 9), (9, 1), (2, 3), (31, 17), (33, 65), (5, 300), (130, 7), (10, 1000), (257, 1001), (640, 1000)]


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_assignments(device, size, dtype, atol):
    s = unit_scores(2, 2, size[0], n=size[1], dtype=dtype, device=device)
    expected = reference(goca.guided_assign, s)
    assert 1 in size or expected.exp().amax() > 1.2 / size[1], "degenerate: a uniform result would pass"
    assert_same_assignment(goca.guided_assign(s, impl="compiled"), expected, atol)
    for views in PRIOR_VIEWS[1:]:
        assert_same_assignment(goca.guided_assign(s, impl="compiled", prior_views=views),
                               reference(goca.guided_assign, s, prior_views=views), atol)
    assert_same_assignment(goca.assign(s, impl="compiled"), reference(goca.assign, s), atol)
    prior = torch.log_softmax(unit_scores(2, 2, size[0], n=size[1], seed=1, dtype=dtype, device=device) / 0.02, -1)
    for sign in (1, -1):
        assert_same_assignment(goca.assign(s, log_prior=prior, prior_sign=sign, impl="compiled"),
                               reference(goca.assign, s, log_prior=prior, prior_sign=sign), atol)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_losses_and_gradients(device, size, dtype, atol):
    scores = unit_scores(2, 4, size[0], n=size[1], dtype=dtype, device=device).requires_grad_()
    exact = scores.detach().double().cpu().requires_grad_()
    for n_assign, views in enumerate(PRIOR_VIEWS, 1) if size[0] < 640 else [(2, PRIOR_VIEWS[0])]:
        loss = goca.guided_loss(scores, n_assign=n_assign, prior_views=views, impl="compiled")
        expected = goca.guided_loss(exact, n_assign=n_assign, prior_views=views, impl="reference")
        torch.testing.assert_close(loss.double().cpu(), expected, rtol=atol, atol=atol)
        torch.testing.assert_close(torch.autograd.grad(loss, scores)[0].double().cpu(),
                                   torch.autograd.grad(expected, exact)[0], rtol=0, atol=10 * atol / size[0])
    targets = goca.guided_assign(scores[:, :2], impl="reference")
    loss = goca.swapped_loss(scores, targets, impl="compiled")
    expected = reference(goca.swapped_loss, scores, log_targets=targets)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=atol, atol=atol)
    with torch.no_grad():
        assert goca.swapped_loss(scores, targets, impl="compiled") == loss  # the path without a gradient


@built
def test_a_large_problem():
    s = unit_scores(4096, n=3000)
    assert_same_assignment(goca.assign(s, impl="compiled"), reference(goca.assign, s), 1e-5)


@pytest.mark.parametrize("iters", [1, 2, 3, 4, 5, 6, 7, 20])  # groups of rounds and what is left of one
def test_rounds(device, iters):
    s = unit_scores(2, 2, 37, n=50, dtype=torch.float64, device=device)
    for views in PRIOR_VIEWS:
        assert_same_assignment(goca.guided_assign(s, iters=iters, prior_views=views, impl="compiled"),
                               reference(goca.guided_assign, s, iters=iters, prior_views=views), 1e-11)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 10.0**k) for k in (2, 5, 6, 7, 8, 12, 33)]
                         + [(torch.float64, 10.0**k) for k in (8, 14, 15, 17, 30, 300)], ids=str)
def test_scores_of_any_size(device, dtype, scale):
    """D is right beyond where a number's last place is more than all of exp2's range, while one group of rounds starts
    from the scores themselves; after that potentials as large are rounded, but rows sum to 1."""
    g = torch.Generator().manual_seed(0)
    s = (torch.randn(2, 2, 33, 50, generator=g, dtype=dtype) * scale).to(device)  # nearly all rows are rebuilt
    assert_same_assignment(goca.assign(s, impl="compiled"), reference(goca.assign, s), 1e-5)
    for function in (goca.assign, goca.guided_assign):
        for iters in (3, 4):
            rows = function(s, iters=iters, impl="compiled").double().exp().sum(-1)
            assert (rows - 1).abs().max() < 1e-5
    assert goca.guided_loss(s, impl="compiled").isfinite()


@pytest.mark.parametrize("iters", [3, 8])
@pytest.mark.parametrize(("dtype", "lambda1", "atol"), [
    (torch.float64, 0.02, 1e-12), (torch.float64, 0.001, 1e-10), (torch.float64, 0.0002, 1e-10),
    (torch.float32, 0.005, 1e-4), (torch.float32, 0.001, 5e-4)])  # S / lambda grows, and its rounding with it
def test_samples_that_no_prototype_likes(device, dtype, lambda1, atol, iters):
    # Sample 3 is further from every prototype than any other sample: its row of E is all below the smallest number, and
    # is rebuilt. Prototype 5 is far from every sample.
    s = unit_scores(2, 2, 40, n=30, dtype=torch.float64)
    s[..., 3, :] = s[..., 3, :] * 0.02 - 0.95
    s[..., :, 5] = s[..., :, 5] * 0.02 - 0.9
    s[..., 3, 5] = -1
    s = s.to(device, dtype)
    if lambda1 <= 0.001:
        row = ((s - s.amax(-2, keepdim=True)) / lambda1)[..., 3, :].exp().sum(-1)
        assert bool((row < 1e-12).all()), "the case must need rebuilding"
    assert_same_assignment(goca.assign(s, lambda1, iters=iters, impl="compiled"),
                           reference(goca.assign, s, lambda1=lambda1, iters=iters), atol)
    for views in ((True, True), (False, True)):  # a row that is rebuilt in either pass, or kept from the first
        given = dict(lambda1=lambda1, lambda2=0.8 * lambda1, iters=iters, prior_views=views)
        assert_same_assignment(goca.guided_assign(s, impl="compiled", **given),
                               reference(goca.guided_assign, s, **given), 10 * atol)


def test_strides_and_leading_dimensions(device):
    base = unit_scores(3, 4, 21, n=34, device=device)
    for s in (base[:, ::2], base[..., ::3], base.transpose(0, 1), base.transpose(-1, -2), base[:, :, 2:19:3, 1:30],
              base[0, 0], base[0, 0, :, :1].expand(21, 5), base[0, :1].expand(3, 21, 34), base[None, None]):
        torch.testing.assert_close(goca.assign(s, impl="compiled"), goca.assign(s.contiguous(), impl="compiled"),
                                   rtol=0, atol=0)
        torch.testing.assert_close(goca.assign(s, log_prior=s.roll(1, -1), impl="compiled"),
                                   goca.assign(s.contiguous(), log_prior=s.roll(1, -1).contiguous(), impl="compiled"),
                                   rtol=0, atol=0)
    for s in (base[:2], base.transpose(0, 2)[:2], base[:2, :, ::2, 1::2], base[:1].expand(2, 4, 21, 34)):
        whole = s.detach().requires_grad_()
        exact = s.contiguous().detach().requires_grad_()
        a, b = goca.guided_loss(whole, impl="compiled"), goca.guided_loss(exact, impl="compiled")
        assert a == b
        torch.testing.assert_close(*(torch.autograd.grad(x, y)[0] for x, y in ((a, whole), (b, exact))), rtol=0, atol=0)
        torch.testing.assert_close(goca.guided_assign(s, impl="compiled"),
                                   goca.guided_assign(s.contiguous(), impl="compiled"), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Determinism, memory
# ---------------------------------------------------------------------------------------------------------------------
def loss_and_gradient(scores):
    scores = scores.detach().requires_grad_()
    loss = goca.guided_loss(scores, impl="compiled")
    return loss.detach(), torch.autograd.grad(loss, scores)[0], goca.guided_assign(scores[:, :2], impl="compiled")


def test_repeated_runs_give_the_same_bits(device):
    s = unit_scores(2, 6, 200, n=333, device=device)
    first = loss_and_gradient(s)
    for _ in range(3):
        for a, b in zip(loss_and_gradient(s), first, strict=True):
            assert torch.equal(a, b)


@built
def test_threads_give_the_same_bits():
    # Stronger than "nothing beyond rounding": partial sums belong to fixed chunks of rows, whoever computes them.
    s = unit_scores(2, 6, 200, n=333)
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append(loss_and_gradient(s))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


@built
def test_memory_is_one_work_matrix_a_problem():
    m, n = 512, 256
    s = unit_scores(2, 6, m, n=n).requires_grad_()
    goca.guided_loss(s, impl="compiled")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss = goca.guided_loss(s, impl="compiled", check_finite=False)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in profile.events())
    gradient, work = 4 * 12 * m * n, 4 * 4 * m * n
    assert gradient + work < allocated < gradient + 1.1 * work  # a tenth: partial sums (1/32) and potentials
    del loss


# ---------------------------------------------------------------------------------------------------------------------
# A good citizen of PyTorch
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(device, dtype):
    s = unit_scores(2, 3, 6, n=9, dtype=dtype, device=device)
    targets = goca.guided_assign(s[:, :2], impl="reference")
    opcheck(torch.ops.goca.assign, (s, None, 0.02, 0.03, 1, 3))
    opcheck(torch.ops.goca.assign, (s, s.roll(1, -1), 0.02, 0.03, -1, 3))
    opcheck(torch.ops.goca.guided_assign, (s[:, :2], 0.02, 0.03, 1, 3, (True, False)))
    for x in (s, s.clone().requires_grad_()):
        grad = x.requires_grad
        opcheck(torch.ops.goca.swapped_loss, (x, targets, 0.1, grad))
        opcheck(torch.ops.goca.guided_loss, (x, s[:, :2], 0, 0.02, 0.03, 1, 3, (True, True), 0.1, grad))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(device, dynamic):
    def step(f, p):
        scores = torch.nn.functional.normalize(f, dim=-1) @ p.T
        return (goca.guided_loss(scores, impl="compiled", prior_views=(True, False))
                + goca.assign(scores[0, 0], impl="compiled").mean())

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    p = torch.randn(30, 8, device=device)
    for m in (7, 12):
        f = torch.randn(2, 4, m, 8, device=device, requires_grad=True)
        torch.testing.assert_close(compiled(f, p), step(f, p))
        torch.testing.assert_close(torch.autograd.grad(compiled(f, p), f)[0], torch.autograd.grad(step(f, p), f)[0])


def test_inference_mode_and_outer_gradients(device):
    s = unit_scores(2, 4, 8, n=11, dtype=torch.float64, device=device)
    loss, gradient, _ = loss_and_gradient(s)
    with torch.inference_mode():
        assert goca.guided_loss(s, impl="compiled") == loss
    x = s.clone().requires_grad_()
    (3 * goca.guided_loss(x, impl="compiled")).backward()
    torch.testing.assert_close(x.grad, 3 * gradient)
    x = s.clone().requires_grad_()
    loss = goca.guided_loss(x, impl="compiled")
    loss.backward(retain_graph=True)
    x.grad.mul_(0)  # must not reach what the graph has kept
    loss.backward()
    torch.testing.assert_close(x.grad, gradient)


def test_the_gradient_is_formed_where_it_is_wanted(device):
    s = unit_scores(2, 4, 8, n=11, device=device)
    call = partial(torch.ops.goca.swapped_loss, log_targets=goca.guided_assign(s[:, :2]), temperature=0.1)
    assert call(s)[1].numel() == 0
    expected = call(s, with_gradient=True)[1]
    x = s.clone().requires_grad_()
    loss, gradient = call(x)
    assert torch.equal(gradient, expected) and torch.equal(torch.autograd.grad(loss, x)[0], expected)
    with torch.no_grad():
        assert call(x)[1].numel() == 0


def test_gradient_penalty(device):
    # What a second derivative leaves out does not show in a gradient penalty alone, but beside another term.
    def gradient(impl, scores, transform):
        x = scores.clone().requires_grad_()
        loss = goca.guided_loss(transform(x), impl=impl)
        first, = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(loss + 10 * first.square().sum() + x.square().mean(), x)[0]

    s = unit_scores(2, 4, 8, n=11, dtype=torch.float64, device=device)
    for transform in (lambda x: x, torch.tanh):
        ours, expected = (gradient(impl, s, transform) for impl in ("compiled", "reference"))
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    without = torch.autograd.grad(goca.guided_loss(x := s.clone().requires_grad_()) + x.square().mean(), x)[0]
    assert (without - gradient("reference", s, lambda x: x)).abs().max() > 0.01 * without.abs().max(), "degenerate"


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch.func itself
def test_torch_func_and_forward_mode(device):
    # Right, or refused by a message that says what to do; and what it says helps.
    s = unit_scores(2, 4, 8, n=11, dtype=torch.float64, device=device)
    targets, tangent = goca.guided_assign(s[:, :2]), torch.ones_like(s).tril()

    def forward_mode(loss):
        with torch.autograd.forward_ad.dual_level(), torch.no_grad():
            dual = torch.autograd.forward_ad.make_dual(s, tangent)
            return torch.autograd.forward_ad.unpack_dual(loss(dual)).tangent

    for function in (goca.guided_loss, partial(goca.swapped_loss, log_targets=targets)):
        compiled, plain = partial(function, impl="compiled"), partial(function, impl="reference")
        x = s.clone().requires_grad_()
        gradient = torch.autograd.grad(compiled(x), x)[0]
        for transform, expected in (
                (lambda f: torch.func.grad(f)(s), gradient),
                (lambda f: torch.func.vjp(f, s)[1](torch.ones_like(f(s)))[0], gradient),
                (lambda f: torch.vmap(torch.func.grad(f))(s[None])[0], gradient),
                (lambda f: torch.func.jvp(f, (s,), (tangent,))[1], (gradient * tangent).sum()),
                (forward_mode, (gradient * tangent).sum())):
            with pytest.raises(RuntimeError, match='call it with impl="reference"'):
                transform(compiled)
            torch.testing.assert_close(transform(plain), expected)

        several = torch.stack([s, s.roll(1, -1), s.roll(1, 2)]).requires_grad_()
        losses = torch.vmap(compiled)(several)
        expected = torch.stack([plain(x) for x in several])
        torch.testing.assert_close(losses, expected)
        torch.testing.assert_close(*(torch.autograd.grad((x * x).sum(), several)[0] for x in (losses, expected)))
        torch.testing.assert_close(torch.vmap(plain)(several), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("impl", ["reference", pytest.param("compiled", marks=built)])
def test_assignments_are_constants_to_every_derivative(impl):
    s = unit_scores(2, 2, 8, n=11, dtype=torch.float64)
    prior = s.log_softmax(-1)
    for function in (partial(goca.guided_assign, impl=impl), partial(goca.assign, log_prior=prior, impl=impl)):
        values, tangents = torch.func.jvp(function, (s,), (torch.ones_like(s),))
        torch.testing.assert_close(values, function(s))
        assert not tangents.any() and not torch.func.grad(lambda x, f=function: f(x).sum())(s).any()
        torch.testing.assert_close(torch.vmap(function)(s[None])[0], values)


@built
def test_meta_tensors():
    s = torch.empty(2, 4, 6, 9, device="meta")
    assert goca.guided_assign(s).shape == s.shape and goca.guided_loss(s).shape == ()


@built
def test_the_operator_checks_for_itself():
    ops, s = torch.ops.goca, unit_scores(2, 3, 4, n=5)
    loss = (0, 0.02, 0.03, 1, 3, (True, True), 0.1, False)
    for call, name in (
            (lambda: ops.assign(s[0, 0, 0], None, 0.02, 0.03, 1, 3), "scores"),
            (lambda: ops.assign(s.half(), None, 0.02, 0.03, 1, 3), "scores"),
            (lambda: ops.assign(s[:0], None, 0.02, 0.03, 1, 3), "scores"),
            (lambda: ops.assign(s, s[0], 0.02, 0.03, 1, 3), "log_prior"),
            (lambda: ops.assign(s, s.double(), 0.02, 0.03, 1, 3), "log_prior"),
            (lambda: ops.assign(s, s.to("meta"), 0.02, 0.03, 1, 3), "log_prior"),
            (lambda: ops.assign(s, None, 0.0, 0.03, 1, 3), "lambda1"),
            (lambda: ops.assign(s, None, 0.02, -0.03, 1, 3), "lambda2"),
            (lambda: ops.assign(s, None, 0.02, 0.03, 0, 3), "prior_sign"),
            (lambda: ops.assign(s, None, 0.02, 0.03, 1, 0), "iters"),
            (lambda: ops.guided_assign(s[:1], 0.02, 0.03, 1, 3, (True, True)), "scores"),
            (lambda: ops.swapped_loss(s, s[:, :, :2], 0.1, False), "log_targets"),
            (lambda: ops.swapped_loss(s, s[:, :2], 0.0, False), "temperature"),
            (lambda: ops.swapped_loss(s[:, :1], s[:, :1], 0.1, False), "scores"),
            (lambda: ops.guided_loss(s, s[:, :2, :, :4], *loss), "batch_scores"),
            (lambda: ops.guided_loss(s, s[:, :2], 1, *loss[1:]), "first_row")):
        with pytest.raises(ValueError, match=f"{name} must"):
            call()


# ---------------------------------------------------------------------------------------------------------------------
# Several processes
# ---------------------------------------------------------------------------------------------------------------------
@built
@pytest.mark.parametrize("rows", [(9, 4), (3, 11, 6)])
def test_processes_equal_one_process_on_the_whole_batch(rows, forked, tmp_path):
    """Each makes its rows' share of the loss from one all-gather (`share_of_the_loss` in helpers/forked.py)."""
    g = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(2, 4, sum(rows), 16, generator=g), dim=-1)
    prototypes = torch.nn.functional.normalize(torch.randn(25, 16, generator=g), dim=-1)
    torch.save((features, prototypes), tmp_path / "in")
    forked("shares_of_the_loss", rows=rows, file=tmp_path / "in", out=tmp_path / "out", said=tmp_path / "said")
    parts = [torch.load(f"{tmp_path / 'out'}{rank}", weights_only=True) for rank in range(len(rows))]

    whole = features.clone().requires_grad_()
    loss = goca.guided_loss(whole @ prototypes.T, impl="compiled")
    loss.backward()
    torch.testing.assert_close(sum(p["loss"] for p in parts), loss.detach())
    torch.testing.assert_close(torch.cat([p["gradient"] for p in parts], 2), whole.grad, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# CUDA
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on the PATH")
@pytest.mark.parametrize("file", ["cuda_assign.cu", "cuda_loss.cu"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvcc_compiles_the_kernels_without_torch(arch, file, tmp_path):
    run = subprocess.run(["nvcc", "-std=c++17", "-O3", "-cubin", f"-arch={arch}", "-Xptxas", "-v", "-o",
                          str(tmp_path / "cuda.cubin"), str(ROOT / "csrc" / file)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    registers = [int(x) for x in re.findall(r"Used (\d+) registers", run.stderr)]
    spills = [int(x) for x in re.findall(r"(\d+) bytes spill stores", run.stderr)]
    # 128 registers are two blocks a processor; a division's slow path may put two registers aside.
    assert registers and max(registers) <= 128 and max(spills) <= 16, run.stderr


@pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
def test_cuda_graph_capture_and_streams(device):
    s = unit_scores(2, 6, 64, n=1000, device=device).requires_grad_()
    expected = loss_and_gradient(s)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for a, b in zip(loss_and_gradient(s), expected, strict=True):
            assert torch.equal(a, b)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = goca.guided_loss(s, impl="compiled")
        gradient = torch.autograd.grad(loss, s)[0]
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss.detach(), expected[0]) and torch.equal(gradient, expected[1])


@pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
def test_no_device_synchronisation(device):
    s = unit_scores(2, 6, 64, n=1000, device=device).requires_grad_()
    try:
        torch.cuda.set_sync_debug_mode("error")
        goca.guided_loss(s, impl="compiled", check_finite=False).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
