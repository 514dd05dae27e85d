"""The CUDA kernels' logic without a GPU: csrc/cuda_*.cu, compiled by g++ over a small stand-in for CUDA (cuda_on_cpu/).

Each CUDA thread runs as a fibre that yields at barriers. Checked: equality with the reference, both forms of launch,
that the order in which threads run changes no bit. Not checked, for it needs a GPU: speed, memory coherence, launches.
"""

import ctypes
import itertools
import shutil

import pytest
import torch
from helpers.cuda import cuda_on_cpu

import goca

NO_PRIOR = (False, False)
TYPES = {torch.float32: ("f32", 1e-5), torch.float64: ("f64", 1e-12)}
ONE_LAUNCH, MANY_LAUNCHES = 1 << 30, 0  # bytes of L2 cache, which decide


class Call(ctypes.Structure):  # as in cuda_on_cpu/run.cpp
    _fields_ = ([(name, ctypes.c_void_p) for name in (
                    "scores", "log_prior", "log_targets", "batch_scores", "log_d", "loss", "gradient")]
                + [(name, ctypes.c_int64) for name in (
                    "views", "crops", "assigning", "m", "N", "M", "first_row", "rgb_prior", "flow_prior", "prior_sign",
                    "iters")]
                + [(name, ctypes.c_double) for name in ("lambda1", "lambda2", "temperature")])


class EmulatedGpu:
    """The kernels on a GPU that runs 3 blocks at once."""

    def __init__(self, path, l2_bytes):
        self.library, self.l2_bytes = ctypes.CDLL(str(path)), l2_bytes
        self.set_order(0)

    def set_order(self, order):  # of threads: 0 forward, 1 backward, else shuffled
        self.library.set_gpu(ctypes.c_int64(self.l2_bytes), ctypes.c_int64(3), ctypes.c_int64(order))

    def run(self, scores, prior_views=(True, True), **kwargs):
        values = dict(scores=scores, views=2, N=scores.shape[-1], rgb_prior=prior_views[0], flow_prior=prior_views[1],
                      prior_sign=1, iters=3, lambda1=0.02, lambda2=0.03, temperature=0.1) | kwargs
        tensors = {k: v.contiguous() for k, v in values.items() if isinstance(v, torch.Tensor)}
        call = Call(**values | {k: v.data_ptr() for k, v in tensors.items()})
        getattr(self.library, f"run_{TYPES[scores.dtype][0]}")(ctypes.byref(call))

    def assign(self, s, **kwargs):
        log_d = torch.full_like(s, torch.nan)
        self.run(s, log_d=log_d, assigning=s.shape[1], M=s.shape[2], **kwargs)
        return log_d


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    # products and sums fused wherever the compiler likes to, as nvcc does
    cuda_on_cpu("run.cpp", folder / "kernels.so", "-march=native", "-ffp-contract=fast")
    return folder


@pytest.fixture(params=[ONE_LAUNCH, MANY_LAUNCHES], ids=["one launch", "many launches"])
def gpu(request, build):
    path = build / f"{request.param}.so"  # a copy each, since the kernels query a GPU only once
    if not path.exists():
        shutil.copy(build / "kernels.so", path)
    return EmulatedGpu(path, request.param)


def unit_scores(*shape, n, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    f = torch.nn.functional.normalize(torch.randn(*shape, 8, dtype=torch.float64, generator=g), dim=-1)
    p = torch.nn.functional.normalize(torch.randn(n, 8, dtype=torch.float64, generator=g), dim=-1)
    return (f @ p.T).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [(1, 1), (3, 40), (29, 5), (10, 300)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_assignments(gpu, size, dtype):
    s = unit_scores(2, 2, size[0], n=size[1], dtype=dtype)
    tolerance = dict(rtol=0, atol=TYPES[dtype][1])
    for views in itertools.product((True, False), repeat=2):
        expected = goca.guided_assign(s.double(), impl="reference", prior_views=views).exp()
        torch.testing.assert_close(gpu.assign(s, prior_views=views).exp().double(), expected, **tolerance)
    prior = torch.log_softmax(unit_scores(2, 2, size[0], n=size[1], dtype=dtype, seed=1) / 0.02, -1)
    expected = goca.assign(s.double(), log_prior=prior.double(), prior_sign=-1, impl="reference").exp()
    torch.testing.assert_close(gpu.assign(s, log_prior=prior, prior_views=NO_PRIOR, prior_sign=-1).exp().double(),
                               expected, **tolerance)


@pytest.mark.parametrize("iters", [1, 2, 5])
def test_rounds_and_rows_that_are_rebuilt(gpu, iters):
    s = unit_scores(2, 1, 20, n=30)
    s[..., 3, :] = s[..., 3, :] * 0.02 - 0.95
    for lambda1, views in itertools.product((0.02, 0.001), ((True, True), (True, False), (False, True))):
        given = dict(lambda1=lambda1, lambda2=0.8 * lambda1, iters=iters, prior_views=views)
        expected = goca.guided_assign(s, impl="reference", **given).exp()
        torch.testing.assert_close(gpu.assign(s, **given).exp(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [1e2, 1e6, 1e9, 1e33])
def test_scores_of_any_size(gpu, scale):
    g = torch.Generator().manual_seed(0)
    s = torch.randn(2, 1, 21, 40, generator=g) * scale  # nearly all rows are rebuilt
    expected = goca.assign(s.double(), impl="reference").exp()
    torch.testing.assert_close(gpu.assign(s, prior_views=NO_PRIOR).double().exp(), expected, rtol=0, atol=1e-5)
    for views, iters in itertools.product((NO_PRIOR, (True, True)), (3, 4)):
        assert (gpu.assign(s, prior_views=views, iters=iters).double().exp().sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(("crops", "assigning", "m", "n"), [
    (2, 1, 5, 7), (4, 2, 5, 50), (9, 3, 3, 40), (25, 24, 1, 260)])  # 24 x 260 doubles don't fit in shared memory
def test_losses_and_gradients(gpu, crops, assigning, m, n):
    scores = unit_scores(2, crops, m, n=n).requires_grad_()
    whole = unit_scores(2, assigning, m + 2, n=n, seed=1)
    targets = goca.guided_assign(whole[:, :, :m], impl="reference")
    loss, gradient = torch.empty((), dtype=torch.float64), torch.empty_like(scores)
    sizes = dict(crops=crops, assigning=assigning, m=m, loss=loss)
    cases = [(dict(log_targets=targets), goca.swapped_loss(scores, targets, impl="reference"))]
    if assigning < 24:  # solving 48 problems fibre by fibre would take a minute
        for views in ((True, True), (True, False)):
            cases.append((dict(batch_scores=whole, M=m + 2, first_row=1, prior_views=views), goca.guided_loss(
                scores, n_assign=assigning, batch_scores=whole, first_row=1, prior_views=views, impl="reference")))
    for inputs, expected in cases:
        gpu.run(scores.detach(), gradient=gradient.detach_().fill_(torch.nan), **inputs, **sizes)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, scores)[0], rtol=0, atol=1e-12)
        loss.fill_(torch.nan)
        gpu.run(scores.detach(), **inputs, **sizes)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)


def test_the_order_of_threads_changes_no_bit(gpu):
    s = unit_scores(2, 2, 19, n=45, dtype=torch.float32)
    for views in ((True, True), (False, True)):
        results = []
        for order in (0, 1, 2, 3):  # forward, backward, two shuffles
            gpu.set_order(order)
            results.append(gpu.assign(s, prior_views=views))
        assert all(torch.equal(x, results[0]) for x in results[1:])
