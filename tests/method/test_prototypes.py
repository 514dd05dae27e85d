"""prototypes.py: Eq. 11, the bound on it, the arrangements that theory knows, the fit, the command."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

import prototypes
from support.errors import BadInput
from support.files import load_arrays, save_arrays


@pytest.fixture(autouse=True)
def one_thread():
    """Small problems gain nothing from a second thread, and lose much where other work has the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unit(num, dim, seed=0, dtype=torch.float32):
    W = torch.randn(num, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(W).to(dtype)


# Eq. 11 ------------------------------------------------------------------------------------------------------------
def test_loss_by_hand():
    angle = torch.tensor([0.0, 60.0, 180.0]).deg2rad()  # nearest cosines 1/2, 1/2 and cos 120 = -1/2
    W = torch.stack([angle.cos(), angle.sin()], dim=1)
    assert prototypes.prototype_loss(W).item() == pytest.approx((0.5 + 0.5 - 0.5) / 3, abs=1e-6)


@pytest.mark.parametrize("block", [1, 37 * 5, 2 ** 22])  # one row a block, a last block that is shorter, all at once
def test_blocks_change_nothing(monkeypatch, block):
    monkeypatch.setattr(prototypes, "BLOCK", block)
    W = unit(37, 9)
    mean, greatest = prototypes.nearest_cosine(W)
    assert mean == pytest.approx(prototypes.prototype_loss(W).item(), abs=1e-6)
    assert greatest == pytest.approx(max(float(W[i] @ W[j]) for i in range(37) for j in range(i)), abs=1e-6)
    # the written-out gradient against autograd's, in float64
    W, beta = unit(37, 9, dtype=torch.float64).requires_grad_(), 30.0
    apart = (W @ W.T).masked_fill(torch.eye(37, dtype=torch.bool), -math.inf)
    expected = torch.logsumexp(beta * apart, dim=1).mean() / beta
    expected.backward()
    loss, gradient = prototypes.soft_loss(W.detach(), beta)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, W.grad)


def test_soft_loss_tends_to_the_loss_from_above():
    W = unit(50, 6, dtype=torch.float64)
    hard = prototypes.prototype_loss(W).item()
    for beta in (1.0, 10.0, 100.0, 1e4):
        assert 0 <= prototypes.soft_loss(W, beta)[0].item() - hard <= math.log(49) / beta


# Bounds and known arrangements ----------------------------------------------------------------------------------------
# Codes that attain Levenshtein's bound: Cohn and Kumar, J. Amer. Math. Soc. 20 (2007), Table 1
SHARP = [(12, 3, 5 ** -0.5), (16, 5, 1 / 5), (27, 6, 1 / 4), (56, 7, 1 / 3), (240, 8, 1 / 2), (112, 21, 1 / 9),
         (162, 21, 1 / 7), (100, 22, 1 / 11), (275, 22, 1 / 6), (891, 22, 1 / 4), (552, 23, 1 / 5), (4600, 23, 1 / 3),
         (196560, 24, 1 / 2)]


@pytest.mark.parametrize("num, dim, cosine", SHARP)
def test_bound_is_attained_by_sharp_codes(num, dim, cosine):
    assert prototypes.levenshtein_bound(num, dim) == pytest.approx(cosine, abs=1e-9)


@pytest.mark.parametrize("num, dim", [(300, 64), (1000, 128), (3000, 128), (10000, 128), (10000, 512), (25, 4), (23, 4),
                                      (10000, 8), (5000, 3), (4999, 3)])
def test_bound_solves_levenshteins_equation(num, dim):
    """L_m(n, s) = N as Levenshtein printed it (1992, eqs. 1.4-1.5); ours goes by a quadrature instead."""
    s = prototypes.levenshtein_bound(num, dim)
    P = [1.0, s]  # Gegenbauer, P_i(1) = 1
    for i in range(1, 200):
        P.append(((2 * i + dim - 2) * s * P[i] - i * P[i - 1]) / (i + dim - 2))

    def odd(k):
        return math.comb(k + dim - 3, k - 1) * ((2 * k + dim - 3) / (dim - 1) - (P[k - 1] - P[k]) / ((1 - s) * P[k]))

    def even(k):
        return math.comb(k + dim - 2, k) * ((2 * k + dim - 1) / (dim - 1)
                                            - (1 + s) * (P[k] - P[k + 1]) / ((1 - s) * (P[k] + P[k + 1])))

    def size(m):  # Delsarte, Goethals, Seidel: where L_m takes over from L_{m-1}
        return math.comb(dim + m // 2 - 1, dim - 1) + math.comb(dim + (m - 1) // 2 - 1, dim - 1)

    m = next(m for m in range(1, 400) if size(m) < num <= size(m + 1))
    assert (odd((m + 1) // 2) if m % 2 else even(m // 2)) == pytest.approx(num, rel=1e-6)


def test_bound_in_the_plane_is_the_polygon_and_elsewhere_rises_with_num():
    for num in range(2, 40):
        assert prototypes.levenshtein_bound(num, 2) == pytest.approx(math.cos(2 * math.pi / num), abs=1e-9)
    bounds = [prototypes.levenshtein_bound(num, 5) for num in range(10, 400)]
    assert all(a < b for a, b in itertools.pairwise(bounds))


@pytest.mark.parametrize("num, dim", [(2, 16), (11, 16), (17, 16), (4, 3)])
def test_simplex(num, dim):
    W = prototypes.fit(num, dim)
    torch.testing.assert_close(W @ W.T, torch.eye(num) * num / (num - 1) - 1 / (num - 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("num, dim", [(18, 16), (25, 16), (32, 16), (6, 3)])
def test_orthoplex(num, dim):
    W = prototypes.fit(num, dim)
    gram = (W @ W.T).round()
    torch.testing.assert_close(W @ W.T, gram, atol=1e-6, rtol=0)
    assert gram.diagonal().eq(1).all() and (gram - torch.eye(num)).max() == 0 and W.shape == (num, dim)


def test_circle():
    W = prototypes.fit(7, 2)
    assert prototypes.nearest_cosine(W) == pytest.approx([math.cos(2 * math.pi / 7)] * 2, abs=1e-6)


@pytest.mark.parametrize("dim", [4, 8, 16, 32, 64, 128])
def test_kerdock(dim):
    """All dim^2 words. The code is linear over Z4, so the cosines of one word are those of every word."""
    W = prototypes.kerdock(dim ** 2, dim)
    most = 2.0 ** -math.ceil((math.log2(dim) - 1) / 2)  # 1/sqrt(dim) or sqrt(2/dim)
    for word in (0, dim + 3):
        cosines = W @ W[word]
        assert cosines[word] == pytest.approx(1, abs=1e-12)
        cosines[word] = -1
        assert cosines.max() == pytest.approx(most, abs=1e-12)
    for orthoplex in (W[:2 * dim], W[-2 * dim:]):  # words come in orthoplexes
        assert (orthoplex @ orthoplex.T - torch.eye(2 * dim)).max() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dim, most", [(256, 1 / 16), (512, 1 / 16)])
def test_kerdock_of_larger_dimensions(dim, most):
    W = prototypes.kerdock(5000, dim)
    cosines = W @ W[1234]
    cosines[1234] = -1
    assert cosines.max() == pytest.approx(most, abs=1e-12)


# The fit -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("num, dim, cosine", SHARP[:4])
def test_fit_finds_the_best_code_where_it_is_known(num, dim, cosine):
    W, construction = prototypes.construct(num, dim, steps=60)
    assert construction == "fit"
    assert prototypes.nearest_cosine(W) == pytest.approx([cosine, cosine], abs=1e-4)


def test_fit_of_the_papers_size_ends_below_the_published_sgd():
    """SGD on Eq. 11 (learning rate 0.1) ends at 0.0991 after 50,000 steps; a tenth of our default steps is enough."""
    W = prototypes.fit(1000, 128, steps=15)
    mean, greatest = prototypes.nearest_cosine(W)
    assert W.shape == (1000, 128) and W.dtype == torch.float32
    torch.testing.assert_close(W.norm(dim=1), torch.ones(1000))
    assert mean < 0.0991 and prototypes.levenshtein_bound(1000, 128) < greatest < 0.0992


def test_fit_or_kerdock_whichever_is_lower():
    W, construction = prototypes.construct(200, 16, steps=20)
    assert construction == "kerdock" and prototypes.nearest_cosine(W) == pytest.approx([0.25, 0.25], abs=1e-6)
    W, construction = prototypes.construct(100, 16, steps=20)
    assert construction == "fit" and prototypes.nearest_cosine(W)[0] < 0.25


@pytest.mark.parametrize("num, dim", [(60, 10), (9, 16), (20, 16), (100, 32)])  # fitted, simplex, orthoplex, fitted
def test_seed_decides_everything(num, dim):
    first, again, other = (prototypes.fit(num, dim, seed=s, steps=10) for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fit_on_cuda():
    W = prototypes.fit(100, 16, device="cuda", steps=40)
    assert W.device.type == "cuda" and prototypes.nearest_cosine(W)[0] < 0.21


@pytest.mark.parametrize("wrong", [{"num": 1}, {"num": -5}, {"dim": 1}, {"dim": 0}, {"steps": 0}])
def test_wrong_sizes_are_refused(wrong):
    name, value = next(iter(wrong.items()))
    with pytest.raises(BadInput, match=f"--{name} is {value}, but must be at least"):
        prototypes.fit(**{"num": 10, "dim": 4, **wrong})


# The command -------------------------------------------------------------------------------------------------------
SMALL = ["--num", "60", "--dim", "10", "--steps", "10", "--device", "cpu"]


def test_command_writes_what_fit_returns(tmp_path, capsys):
    out = tmp_path / "new" / "p.npz"
    assert prototypes.main([*SMALL, "--seed", "5", "--out", str(out)]) == 0
    header, arrays = load_arrays(out, "prototypes", "")
    W = prototypes.fit(60, 10, seed=5, steps=10)
    mean, greatest = prototypes.nearest_cosine(W)
    assert list(arrays) == ["prototypes"] and arrays["prototypes"].dtype == np.float32
    np.testing.assert_array_equal(arrays["prototypes"], W.numpy())
    assert header | {"threads": 0} == {
        "kind": "prototypes", "version": 1, "num": 60, "dim": 10, "seed": 5, "steps": 10, "construction": "fit",
        "mean_cosine": mean, "max_cosine": greatest, "bound": prototypes.levenshtein_bound(60, 10), "device": "cpu",
        "threads": 0, "torch": torch.__version__}
    said = capsys.readouterr().out
    assert f"mean {mean:.4f}, maximum {greatest:.4f}; no maximum can be below {header['bound']:.4f}" in said
    assert said.count("\nbeta ") == 13 and said.startswith("beta 2,")  # sqrt(10)/2 doubled 13 times, to 12953
    assert [p.name for p in out.parent.iterdir()] == ["p.npz"]


def test_time_is_estimated_once_there_is_something_to_go_by(monkeypatch, capsys):
    clock = iter([0.0, 40.0, 42.0, 50.0])
    monkeypatch.setattr(prototypes.time, "monotonic", lambda: next(clock))
    progress = prototypes.Progress()
    for share, beta in ((0.001, 1), (0.1, 2), (0.501, 4)):  # the first step took 40 s, half of the others 10 s
        progress(share, beta, 0.5)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["beta 1, soft loss 0.5000, 40 s", "beta 2, soft loss 0.5000, 42 s",
                     "beta 4, soft loss 0.5000, 50 s, about 10 s to go"]


def test_command_keeps_what_is_there(tmp_path, capsys):
    out = tmp_path / "p.npz"
    assert prototypes.main([*SMALL, "--out", str(out)]) == 0
    stamp, content = out.stat().st_mtime_ns, out.read_bytes()
    capsys.readouterr()
    assert prototypes.main([*SMALL, "--out", str(out)]) == 0
    assert "is there already" in capsys.readouterr().out and out.stat().st_mtime_ns == stamp
    with pytest.raises(BadInput, match=r"p.npz was made with --seed 0; give another --out, or --force"):
        prototypes.main([*SMALL, "--seed", "1", "--out", str(out)])
    assert out.read_bytes() == content
    assert prototypes.main([*SMALL, "--seed", "1", "--out", str(out), "--force"]) == 0
    assert load_arrays(out, "prototypes", "")[0]["seed"] == 1


def test_command_refuses_what_it_cannot_write(tmp_path):
    (tmp_path / "text").write_text("not an archive")
    (tmp_path / "features.npz").write_bytes(b"")
    save_arrays(tmp_path / "other.npz", "features", {}, features=np.zeros(3))
    for out, message in [(tmp_path, "is a folder"), (tmp_path / "text", "damaged or no prototypes file"),
                         (tmp_path / "features.npz", "damaged or no prototypes file"),
                         (tmp_path / "other.npz", "holds features"), (tmp_path / "text" / "p.npz", "can't be written"),
                         (tmp_path / ("x" * 300), "can't be written")]:
        with pytest.raises(BadInput, match=message) as e:
            prototypes.main([*SMALL, "--out", str(out)])
        assert str(out) in str(e.value) and "\n" not in str(e.value)
    assert (tmp_path / "text").read_text() == "not an archive"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_command_refuses_cuda_where_there_is_none(tmp_path):
    with pytest.raises(BadInput, match="--device cuda: torch sees no CUDA device"):
        prototypes.main(["--device", "cuda", "--out", str(tmp_path / "p.npz")])


def test_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    calls = []

    def interrupted(W, beta, original=prototypes.soft_loss):
        calls.append(beta)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return original(W, beta)

    monkeypatch.setattr(prototypes, "soft_loss", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prototypes.main([*SMALL, "--out", str(tmp_path / "p.npz")])
    assert len(calls) == 30 and list(tmp_path.iterdir()) == []


def test_header_is_plain_json(tmp_path):
    prototypes.main(["--num", "5", "--dim", "8", "--out", str(tmp_path / "p.npz")])
    with np.load(tmp_path / "p.npz", allow_pickle=False) as f:
        header = json.loads(str(f["header"]))
    assert header["construction"] == "simplex" and header["steps"] == "default"
    assert header["max_cosine"] == pytest.approx(header["bound"], abs=1e-6)
