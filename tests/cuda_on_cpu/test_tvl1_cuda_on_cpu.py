"""The CUDA TV-L1 without a GPU: csrc/tvl1_cuda.cu under g++ over a stand-in for CUDA (cuda_on_cpu/).

Its bits are those of the CPU's operator, whatever the batch and the order in which threads run. Not checked, for it
needs a GPU: speed, memory coherence, contraction by nvcc (the file forbids it), running out of memory.
"""

import ctypes
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from helpers.cuda import cuda_on_cpu
from helpers.paths import ROOT
from helpers.tvl1 import MOTIONS, moved, texture

import goca
import tvl1

FEW = dict(inner=6, outer=2, warps=2)  # a fibre a thread is slow


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("tvl1_cuda_on_cpu") / "kernels.so"
    cuda_on_cpu("run_tvl1.cpp", path, "-ffp-contract=off")
    library = ctypes.CDLL(str(path))
    library.blocks.restype = ctypes.c_int64
    return library


@pytest.fixture(scope="module")
def kernels(library):
    if goca._goca is None:
        pytest.skip(f"the extension isn't built, so there is nothing to compare with: {goca.BUILD}")

    def run(frames, batch=256, order=0, **params):
        frames = frames.contiguous()
        flow = torch.full((frames.shape[0], frames.shape[1] - 1, 2, *frames.shape[2:]), torch.nan)
        pointers = [ctypes.c_void_p(frames.data_ptr() if frames.dtype == dtype else None)
                    for dtype in (torch.uint8, torch.float32)]
        library.run(*pointers, (ctypes.c_int64 * 4)(*frames.shape),
                    (ctypes.c_double * 10)(*{**tvl1.DEFAULTS, **params}.values()), ctypes.c_int64(batch),
                    ctypes.c_int64(order), ctypes.c_void_p(flow.data_ptr()))
        return flow

    return run


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (17, 33), (31, 44)], ids=str)
def test_the_bits_of_the_cpu(kernels, size):
    """Two levels at most; pairs that stop at different times."""
    still = np.stack([texture(*size, 5)] * 2)
    films = torch.from_numpy(np.stack([moved(*size, MOTIONS["turn"]), still, moved(*size, MOTIONS["up"], 2)]))
    expected = tvl1.flow(films, impl="compiled", **FEW)
    assert torch.equal(kernels(films, **FEW), expected)
    assert size == (1, 1) or expected[0].abs().max() > 0.1, "degenerate: zero would pass"
    assert torch.equal(kernels(films, batch=2, **FEW), expected)
    floats = films.float() / 255
    assert torch.equal(kernels(floats, **FEW), tvl1.flow(floats, impl="compiled", **FEW))


def test_stops_and_medians(kernels):
    films = torch.from_numpy(moved(18, 24, MOTIONS["right"]))[None]
    for params in (dict(epsilon=0.05), dict(median=1, inner=15, outer=1), dict(scales=1, warps=1)):
        assert torch.equal(kernels(films, **params), tvl1.flow(films, impl="compiled", **params))


def test_pairs_that_ended_are_not_launched(kernels, library):
    """The first goes on long after the others have ended, beyond the host's first looks."""
    moving = moved(18, 30, MOTIONS["right"])
    films = torch.from_numpy(np.stack([moving] + 7 * [np.stack([texture(18, 30, 5)] * 2)]))
    params = dict(scales=1, warps=1, epsilon=0.001, inner=30, outer=2)
    blocks = []
    for batch in (films[:1], films):
        before = library.blocks()
        flow = kernels(batch, **params)
        blocks.append(library.blocks() - before)
        assert torch.equal(flow, tvl1.flow(batch, impl="compiled", **params))
    alone, together = blocks
    tiles = 3  # of a pair
    assert alone > 64 * tiles, "degenerate: the first ended before its 60 iterations and 2 medians of 2 components"
    assert together - alone < 7 * tiles * 42, "20 iterations to the second look, a median, loading, storing: about 30"


def test_length_is_rounded_as_through_doubles(library):
    """Also where the length lies in the middle between two floats, and far from 1."""
    random = np.random.default_rng(0)
    n = 400_000
    x, y = (random.normal(size=n) * 10.0 ** random.integers(-24, 18, n) for _ in range(2))
    a = random.integers(2900, 4090, n)
    b = random.integers(2900, 4090, n) // 2 * 2 + 1 - a % 2  # a^2 - b^2, 2ab: the length a^2 + b^2 is odd,
    assert np.all((a * a + b * b > 2**24) & (a * a + b * b < 2**25))  # one bit too long for a float
    x, y = (np.concatenate(parts).astype(np.float32) for parts in (
        (x, a * a - b * b, [0, 0, 1, 3e-30, 1e-38, 1e-45, 3e30]),
        (y, 2 * a * b, [0, 1, 0, 4e-30, 1e-38, 0, 1e30])))
    expected = np.sqrt(x.astype(np.float64)**2 + y.astype(np.float64)**2).astype(np.float32)
    lengths = np.full(len(x), np.nan, np.float32)
    library.lengths(*(ctypes.c_void_p(v.ctypes.data) for v in (x, y)), ctypes.c_int64(len(x)),
                    ctypes.c_void_p(lengths.ctypes.data))
    assert np.array_equal(lengths, expected)


def test_the_order_of_threads_changes_no_bit(kernels):
    films = torch.from_numpy(np.stack([texture(20, 46, seed=s)[:, 2:42] for s in range(3)]))[None]
    results = [kernels(films, order=order, inner=3, outer=2, warps=2) for order in (0, 1, 2, 3)]
    assert all(torch.equal(x, results[0]) for x in results[1:])


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on the PATH")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvcc_compiles_it_without_spills(arch, tmp_path):
    run = subprocess.run(["nvcc", "-std=c++17", "-O3", "-cubin", f"-arch={arch}", "-Xptxas", "-v", "-o",
                          str(tmp_path / "tvl1.cubin"), str(ROOT / "csrc" / "tvl1_cuda.cu")],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert set(re.findall(r"(\d+) bytes spill stores", run.stderr)) == {"0"}, run.stderr


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc on the PATH")
def test_nvcc_makes_no_multiplication_and_addition_one(tmp_path):
    """It may by default, and would round once where the CPU rounds twice; g++ above does not show it."""
    code = []
    for may in ("true", "false"):
        path = tmp_path / f"{may}.ptx"
        subprocess.run(["nvcc", "-std=c++17", "-O3", "-ptx", "-arch=sm_90", f"-fmad={may}", "-o", str(path),
                        str(ROOT / "csrc" / "tvl1_cuda.cu")], check=True, capture_output=True)
        code.append(path.read_text().replace(".rn", ""))  # the second names the rounding, the first leaves it out
    assert "fma.f32" in code[0] and code[0] == code[1]
