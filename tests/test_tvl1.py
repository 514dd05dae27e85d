"""TV-L1: equal to OpenCV, on films and on known motion; the same bits whatever the batch, the threads, the run.

The iteration amplifies rounding (frames that differ by 0.001 grey levels: 0.01 to 0.03 px). So the reference, which
rounds otherwise, is compared after few iterations; the compiled operator, which rounds as OpenCV 5 does, after all.
OpenCV 4 rounds its warps to 1/32 px: there both are asked for less (LIKE), and step by step nothing can be compared.
"""

import ctypes
import itertools
import shutil
import subprocess

import cv2
import numpy as np
import pytest
import torch
from helpers.paths import ROOT
from helpers.tvl1 import FIVE, LIKE, MOTIONS, SAME, moved, texture
from torch.library import opcheck

import goca
import tvl1
from support.stores import quantise
from support.videos import VIDEO_SUFFIXES, decode

built = pytest.mark.skipif(goca._goca is None, reason=f"the extension isn't built: {goca.BUILD}")
five = pytest.mark.skipif(not FIVE, reason="OpenCV 4 rounds its warps to 1/32 px")
OPENCV = {"tau": "Tau", "lam": "Lambda", "theta": "Theta", "scales": "ScalesNumber", "warps": "WarpingsNumber",
          "epsilon": "Epsilon", "inner": "InnerIterations", "outer": "OuterIterations", "scale_step": "ScaleStep",
          "median": "MedianFiltering"}


def opencv(frames, **params):
    """frames [T, H, W] -> [T-1, 2, H, W]"""
    solver = cv2.optflow.DualTVL1OpticalFlow_create()
    for name, value in params.items():
        getattr(solver, f"set{OPENCV[name]}")(value)
    return np.stack([solver.calc(a, b, None).transpose(2, 0, 1) for a, b in itertools.pairwise(frames)])


def ours(frames, impl="compiled", **params):
    return tvl1.flow(torch.from_numpy(frames)[None], impl=impl, **params)[0].numpy()


def assert_as_asked(flow, expected):
    """Mean end-point distance below 0.02 px; 99 % (OpenCV 4: 98 %) of the stored 8-bit values equal or one step
    apart."""
    assert flow.shape == expected.shape and flow.dtype == expected.dtype
    assert np.linalg.norm(flow - expected, axis=1).mean() < LIKE
    steps = np.abs(quantise(flow).astype(int) - quantise(expected))
    assert (steps <= 1).mean() > (0.99 if FIVE else 0.98)


def greys(path, count, height, start=5):
    frames = []
    for k, frame in enumerate(decode(path)):
        if k >= start:
            grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
            size = round(grey.shape[1] * height / grey.shape[0]), height
            frames.append(cv2.resize(grey, size, interpolation=cv2.INTER_AREA))
        if len(frames) == count:
            return np.stack(frames)
    raise AssertionError(f"{path} is too short")


# ---------------------------------------------------------------------------------------------------------------------
# As OpenCV
# ---------------------------------------------------------------------------------------------------------------------


@built
@pytest.mark.parametrize("motion", MOTIONS)
def test_known_motion(motion):
    """As OpenCV, and right: what stays in the picture moves as its pixels do."""
    frames = moved(72, 88, MOTIONS[motion])
    flow = ours(frames)
    assert_as_asked(flow, opencv(frames))
    y, x = np.mgrid[:72, :88].astype(np.float64)
    x, y = x - 44, y - 36
    m = np.float64(MOTIONS[motion])
    truth = np.stack([m[0, 0] * x + m[0, 1] * y + m[0, 2] - x, m[1, 0] * x + m[1, 1] * y + m[1, 2] - y])
    inner = np.s_[:, 14:-14, 14:-14]
    assert np.linalg.norm((flow[0] - truth)[inner], axis=0).mean() < 0.1


@built
def test_occlusion():
    """A square passes over a still ground."""
    frames = np.stack([texture(64, 80)] * 2)
    square = texture(24, 24, seed=1)
    frames[0, 20:44, 24:48], frames[1, 20:44, 28:52] = square, square
    flow = ours(frames)
    assert_as_asked(flow, opencv(frames))
    assert np.abs(flow[0, :, 26:38, 32:42] - np.array([4, 0])[:, None, None]).mean() < 0.2
    assert np.abs(flow[0, :, :, :12]).mean() < 0.05


@built
@pytest.mark.parametrize("dataset", ["ucf101", "hmdb51", "kinetics400"])
def test_film(dataset, real_clips):
    paths = sorted(p for p in (real_clips / dataset / "videos").rglob("*") if p.suffix in VIDEO_SUFFIXES)
    for path in paths[:3]:
        frames = greys(path, 3, 96)
        assert_as_asked(ours(frames), opencv(frames))
    frames = greys(paths[0], 2, 240)
    assert_as_asked(ours(frames), opencv(frames))


@built
@five
@pytest.mark.parametrize("size", [(16, 16), (33, 47), (64, 85), (67, 96), (131, 81)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_the_bits_of_opencv(size):
    """Every operation is rounded as there, but for a few pixels at the end of a row or column of its pyramid."""
    frames = moved(*size, MOTIONS["turn"], seed=3)
    flow, expected = ours(frames), opencv(frames)
    assert np.linalg.norm(flow - expected, axis=1).mean() < 1e-4 and (flow == expected).mean() > 0.9


@built
@pytest.mark.parametrize("params", [{"warps": 1, "epsilon": 0.03}, {"scales": 1}, {"inner": 7, "outer": 2},
                                    {"median": 1}, {"lam": 0.05}, {"tau": 0.125}, {"theta": 0.5},
                                    {"scale_step": 0.5}], ids=str)
def test_parameters(params):
    """Each is honoured as OpenCV honours it."""
    frames = moved(48, 60, MOTIONS["up"])
    flow = ours(frames, **params)
    assert np.linalg.norm(flow - opencv(frames, **params), axis=1).mean() < SAME
    assert not np.array_equal(flow, ours(frames))


def test_defaults_are_opencvs():
    solver = cv2.optflow.DualTVL1OpticalFlow_create()
    assert {name: getattr(solver, f"get{setter}")() for name, setter in OPENCV.items()} == tvl1.DEFAULTS
    assert solver.getGamma() == 0


@five
def test_reference_is_opencv_step_by_step():
    """Before rounding is amplified: few iterations, on every level."""
    frames = moved(48, 60, MOTIONS["turn"])
    for params in ({"inner": 1, "outer": 1, "warps": 1}, {"inner": 5, "outer": 2, "warps": 2}):
        params["epsilon"] = 0.0
        expected = opencv(frames, **params)
        assert np.abs(ours(frames, "reference", **params) - expected).max() < 2e-3
        assert np.abs(expected).max() > 0.2, "degenerate: zero would pass"
    assert np.linalg.norm(ours(frames, "reference") - opencv(frames), axis=1).mean() < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# The same bits
# ---------------------------------------------------------------------------------------------------------------------
@built
def test_batch_threads_and_runs_change_no_bit():
    films = torch.from_numpy(np.stack([np.stack([texture(40, 52, seed)[:, k:k + 44] for k in (0, 1, 3, 4)])
                                       for seed in range(5)]))
    whole = tvl1.flow(films)
    assert whole.shape == (5, 3, 2, 40, 44)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert torch.equal(tvl1.flow(films), whole)
    finally:
        torch.set_num_threads(threads)
    for k in (0, 4):
        for t in range(3):
            assert torch.equal(tvl1.flow(films[k:k + 1, t:t + 2]), whole[k:k + 1, t:t + 1])
    assert torch.equal(tvl1.flow(films.transpose(2, 3)[:, ::2].transpose(2, 3)), tvl1.flow(films[:, ::2].contiguous()))


PLAIN = """
#include "PATH/csrc/tvl1_cpu.cpp"
extern "C" void run(const uint8_t* bytes, int64_t h, int64_t w, float* flow) {
  goca::tvl1::cpu::flow({bytes, nullptr, 1, 2, h, w, {0.25, 0.15, 0.3, 5, 5, 0.01, 30, 10, 0.8, true}, flow});
}
"""
PARALLEL = """
#include <cstdint>
namespace at {
inline int get_num_threads() { return 1; }
template <typename F> void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) { f(begin, end); }
}
"""


@built
@pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile it without vectors with")
def test_vectors_change_no_bit(tmp_path):
    """The CPU's code for the base machine alone, where the operator takes the widest vectors that there are."""
    (tmp_path / "ATen").mkdir()
    (tmp_path / "ATen" / "Parallel.h").write_text(PARALLEL)
    (tmp_path / "plain.cpp").write_text(PLAIN.replace("PATH", str(ROOT)))
    done = subprocess.run(["g++", "-std=c++20", "-O1", "-fno-tree-vectorize", "-D__SANITIZE_ADDRESS__", "-w", "-shared",
                           "-fPIC", f"-I{tmp_path}", "-o", str(tmp_path / "plain.so"), str(tmp_path / "plain.cpp")],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = ctypes.CDLL(str(tmp_path / "plain.so"))
    for size in ((33, 47), (64, 85)):
        frames = moved(*size, MOTIONS["turn"])
        flow = np.full((2, *size), np.nan, np.float32)
        library.run(ctypes.c_void_p(frames.ctypes.data), *map(ctypes.c_int64, size), ctypes.c_void_p(flow.ctypes.data))
        assert np.array_equal(flow, ours(frames)[0]) and np.abs(flow).max() > 0.5


@built
def test_thousands_of_pairs():
    frames = torch.from_numpy(np.stack([texture(18, 22, seed % 97)[seed % 3:][:15, seed % 5:][:, :17]
                                        for seed in range(3001)]))[None]
    few = dict(warps=1, outer=1)
    flow = tvl1.flow(frames, **few)
    assert flow.shape == (1, 3000, 2, 15, 17) and flow.isfinite().all()
    for t in (0, 1499, 2999):
        assert torch.equal(flow[:, t:t + 1], tvl1.flow(frames[:, t:t + 2], **few)) and flow[0, t].any()


@pytest.mark.skipif(not torch.cuda.is_available() or goca._goca is None or not goca._goca.cuda,
                    reason="no GPU, or the extension is built without CUDA kernels")
def test_gpu_has_the_bits_of_the_cpu():
    films = torch.from_numpy(np.stack([moved(96, 128, motion, seed) for seed, motion in enumerate(MOTIONS.values())]))
    assert torch.equal(tvl1.flow(films.cuda()).cpu(), tvl1.flow(films))


@built
def test_float_frames():
    """0..1 as float32 is 0..255 as bytes."""
    frames = torch.from_numpy(moved(40, 52, MOTIONS["right"]))[None]
    back = (frames.float() / 255 * 255).byte()
    assert torch.equal(back, frames), "not the same numbers"
    difference = (tvl1.flow(frames.float() / 255) - tvl1.flow(frames)).abs()
    assert difference.mean() < 0.02
    few = dict(inner=3, outer=1, warps=1)
    torch.testing.assert_close(tvl1.flow(frames.float() / 255, **few), tvl1.flow(frames, **few), rtol=0, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", pytest.param("compiled", marks=built)])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 1), (2, 3), (5, 5), (15, 40), (17, 16)], ids=str)
def test_tiny_frames(impl, size):
    frames = np.stack([texture(30, 50, s, sigma=1)[:size[0], :size[1]] for s in (0, 1)])
    flow = ours(frames, impl, outer=2)
    assert flow.shape == (1, 2, *size) and np.isfinite(flow).all()
    if min(size) > 2 and FIVE:  # OpenCV reads beyond smaller ones
        assert np.linalg.norm(flow - opencv(frames, outer=2), axis=1).mean() < 0.05


@pytest.mark.parametrize("impl", ["reference", pytest.param("compiled", marks=built)])
@pytest.mark.parametrize(("first", "second"), [(0, 0), (200, 200), (0, 255)])
def test_nothing_moves_where_nothing_is_seen(impl, first, second):
    frames = np.stack([np.full((24, 40), value, np.uint8) for value in (first, second)])
    assert not ours(frames, impl).any()


@built
def test_operator():
    opcheck(torch.ops.goca.tvl1_flow, (torch.from_numpy(moved(16, 20, MOTIONS["right"]))[None],
                                       *tvl1.DEFAULTS.values()),
            test_utils=("test_schema", "test_faketensor"))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------
GOOD = torch.zeros(1, 2, 16, 16)


@pytest.mark.parametrize(("frames", "params", "words"), [
    (GOOD[0], {}, r"frames must be a tensor \[B, T, H, W\]"),
    (GOOD.double(), {}, "of uint8 or float32, got torch.float64"),
    (GOOD.numpy(), {}, "got ndarray"),
    (GOOD[:, :1], {}, r"at least one pair.*\[1, 1, 16, 16\]"),
    (GOOD[:, :, :0], {}, "at least one pair"),
    (GOOD * torch.nan, {}, "frames must be finite"),
    (GOOD, {"gamma": 1.0}, "no parameter gamma"),
    (GOOD, {"theta": 0.0}, "theta must be a positive number"),
    (GOOD, {"warps": 0}, "warps must be a whole number of at least 1"),
    (GOOD, {"inner": 1.5}, "inner must be a whole number"),
    (GOOD, {"epsilon": -1.0}, "epsilon must be"),
    (GOOD, {"scale_step": 1.0}, "scale_step must lie between 0 and 1"),
    (GOOD, {"warps": float("inf")}, "warps must be a whole number"),
    (GOOD, {"scales": True}, "scales must be a number, got True"),
    (GOOD, {"lam": "a"}, "lam must be a number, got 'a'"),
    (GOOD, {"median": 3}, "median must be 5, or 1"),
    (GOOD, {"impl": "fast"}, "impl must be auto, reference or compiled"),
])
def test_bad_input(frames, params, words):
    with pytest.raises(ValueError, match=words):
        tvl1.flow(frames, **params)


@pytest.mark.parametrize("impl", ["reference", pytest.param("compiled", marks=built)])
def test_scalars_of_numpy_are_numbers(impl):
    x = torch.rand(1, 2, 20, 20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(tvl1.flow(x, impl=impl, warps=np.int64(1), outer=np.int32(1), epsilon=np.float32(0.5)),
                       tvl1.flow(x, impl=impl, warps=1, outer=1, epsilon=0.5))


@built
def test_the_operator_checks_too():
    for k, value in ((0, -1.0), (3, 0), (5, -0.5), (8, 1.5), (9, 3)):
        values = list(tvl1.DEFAULTS.values())
        values[k] = value
        with pytest.raises(ValueError, match=f"{list(tvl1.DEFAULTS)[k]} must"):
            torch.ops.goca.tvl1_flow(GOOD, *values)
    with pytest.raises(ValueError, match="frames must"):
        torch.ops.goca.tvl1_flow(GOOD.double(), *tvl1.DEFAULTS.values())
