"""Rows of bench.py that feed the training: the loader, and the prototypes.

loader      From files to 2 long and 4 short clips of both views, S3D's sizes, one core. Baseline: the whole video and
            its whole flow are decoded, and each frame of each clip goes through torch alone (resize, crop, flip,
            jitter, blur, normalise), as the released code's transforms do; written from their description. The flow
            stored here is DIS, not TV-L1: only reading it is timed. On the films of --videos, else on generated ones.
prototypes  Eq. 11 for 1000 prototypes of 128-d. Baseline: SGD as published; 200 of its 50,000 steps are timed.
"""

import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.data import default_collate

import data
import flow
import prototypes as eq11
from experiments import walkers
from experiments.measure import in_turns, row

SIZE, SCALE, LENGTHS = 128, (136, 190), [32, 32, 16, 16, 16, 16]


# ---------------------------------------------------------------------------------------------------------------------
# loader
# ---------------------------------------------------------------------------------------------------------------------
def dis_store(videos, root):
    """A flow store of cheap flow (DIS) at the real resolution -> FlowStore."""
    (root / "header.json").write_text('{"kind": "flow", "version": 1}')
    store = data.FlowStore(root)
    solver = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
    for video in videos:
        grey = list(flow.grey_frames(video.path, 256, {}))
        fields = (solver.calc(a, b, None) for a, b in pairwise(grey))
        data.write_avi(store.path(video.name), (data.quantise(np.concatenate([f[..., 0], f[..., 1]])) for f in fields),
                       {})
    return store


def jitter(x, brightness, contrast, saturation, hue):
    """Colour jitter of one frame [3, H, W] in 0..1, one operation after the other, each clamped."""
    grey = x.new_tensor(data.GREY).view(3, 1, 1)
    x = (x * brightness).clamp(0, 1)
    x = (x * contrast + (1 - contrast) * (x * grey).sum(0).mean()).clamp(0, 1)
    x = (x * saturation + (1 - saturation) * (x * grey).sum(0, keepdim=True)).clamp(0, 1)
    turn = data._colour_matrices(x.new_tensor([[0, 1, 1, 1, hue, 0]]))[0]
    return torch.einsum("ij,jhw->ihw", turn, x).clamp(0, 1)


def blur(x, sigma):
    """Gaussian blur of one frame [C, H, W], 13 taps an axis."""
    at = torch.arange(-6, 7, dtype=x.dtype)
    g = torch.exp(-at * at / (2 * sigma * sigma))
    g = (g / g.sum()).expand(len(x), 1, 1, -1)
    x = F.pad(x[None], (6, 6, 6, 6), mode="reflect")
    return F.conv2d(F.conv2d(x, g, groups=len(g)), g.transpose(2, 3), groups=len(g))[0]


def frame_by_frame(video, store, rng):
    """One sample in the baseline's way -> list of {view: [C, T, S, S]}."""
    rgb = [torch.from_numpy(cv2.cvtColor(f, cv2.COLOR_BGR2RGB)).permute(2, 0, 1) for f in data.decode(video.path)]
    reader = store.open(video.name)
    planes = [torch.from_numpy(np.stack(np.split(p, 2))) for p in reader.read(range(len(reader)))]
    clips = []
    for frames in LENGTHS:
        n = len(planes)
        start, short = int(rng.integers(max(1, n - frames + 1))), int(rng.uniform(*SCALE))
        place, flip, strength = rng.uniform(size=2), rng.uniform() < 0.5, rng.uniform(0.6, 1.4, 3)
        jittered, sigma = rng.uniform() < 0.8, rng.uniform(0.1, 2.0) if rng.uniform() < 0.5 else 0
        clip = {"rgb": [], "flow": []}
        for t in data.clip_indices(start, frames, 1, n):
            for view, source in (("rgb", rgb), ("flow", planes)):
                x = source[t].float() / 255 if view == "rgb" else (source[t].float() - 128) / 127
                scale = short / min(x.shape[1:])
                size = [max(SIZE, round(side * scale)) for side in x.shape[1:]]
                x = F.interpolate(x[None], size=size, mode="bilinear")[0]
                top, left = (int((side - SIZE) * p) for side, p in zip(x.shape[1:], place, strict=True))
                x = x[:, top:top + SIZE, left:left + SIZE]
                x = x.flip(-1) if flip else x
                if view == "rgb":
                    x = jitter(x, *strength, 0.05) if jittered else x
                    x = blur(x, sigma) if sigma else x
                    x = (x - x.new_tensor(data.MEAN).view(3, 1, 1)) / x.new_tensor(data.STD).view(3, 1, 1)
                clip[view].append(x)
        clips.append({view: torch.stack(frames_, dim=1) for view, frames_ in clip.items()})
    return clips


def real_or_generated(videos, folder):
    """Films to load -> (list of Video, what they are)."""
    if videos:
        return [data.Video(path, name, 0) for name, path in data.find_videos(videos).items()], "real clips"
    walkers.make(folder / "films", train=4, test=1, size=240, frames=150)
    films = walkers.clips(folder / "films", "train")
    return [data.Video(str(path), path.stem, 0) for path, _ in films], "generated films of 240 px"


def loader(device, videos):
    """Samples a second and core: decode, cut, collate, augment."""
    threads, cv_threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            films, what = real_or_generated(videos, Path(folder))
            (Path(folder) / "flow").mkdir()
            store = dis_store(films, Path(folder) / "flow")
            clips = data.TrainClips(films, store)
            at = {"ours": 0, "baseline": 0}

            def loaded():
                at["ours"] += 1
                return default_collate([clips[(0, at["ours"] % len(films))]])

            def ours():
                return data.augment(loaded(), device)

            def baseline():
                at["baseline"] += 1
                out = frame_by_frame(films[at["baseline"] % len(films)], store, np.random.default_rng(0))
                return [{view: x.to(device) for view, x in clip.items()} for clip in out]

            shapes = [[x.shape[2:] for x in clip["rgb"].flatten(0, 1)[:, None]] for clip in ours()]
            assert sum(map(len, shapes)) == len(baseline()) == len(LENGTHS)
            baseline_ms, ours_ms, loaded_ms = in_turns([baseline, ours, loaded], device, seconds=20)
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(cv_threads)
    for ms, what_done in ((ours_ms, "augmentation on the same core"), (loaded_ms, "augmentation left to the device")):
        print(f"{what_done}: {1e3 / ms:.1f} samples a second and core; 95 a second need {0.095 * ms:.1f} cores",
              file=sys.stderr)
        yield row("loader", f"2 x 32 + 4 x 16 frames of both views, {what}, one thread, {what_done}", device,
                  baseline_ms, ms)


# ---------------------------------------------------------------------------------------------------------------------
# prototypes
# ---------------------------------------------------------------------------------------------------------------------
def published_sgd(num, dim, steps, device):
    """Eq. 11 by SGD on the row maximum, learning rate 0.1, rows kept on the sphere -> mean nearest-neighbour cosine."""
    W = F.normalize(torch.randn(num, dim, generator=torch.Generator().manual_seed(0)), dim=1).to(device)
    for _ in range(steps):
        W.requires_grad_()
        gradient, = torch.autograd.grad(eq11.prototype_loss(W), W)
        W = F.normalize(W.detach() - 0.1 * gradient, dim=1)
    return eq11.nearest_cosine(W)[0]


def prototypes(device, videos):
    """1000 x 128; the baseline's 50,000 steps are timed on 200 of them, and its end is quoted from a whole run."""
    steps = 200
    start = time.perf_counter()
    published_sgd(1000, 128, steps, device)
    baseline_ms = 1e3 * (time.perf_counter() - start) * 50_000 / steps
    start = time.perf_counter()
    ours = eq11.fit(1000, 128, device=device)
    ours_ms = 1e3 * (time.perf_counter() - start)
    cosine, _ = eq11.nearest_cosine(ours)
    assert cosine < 0.0991, cosine  # where the published SGD ends
    yield row("prototypes", f"1000 x 128, mean nearest-neighbour cosine {cosine:.4f}; SGD's 50,000 steps end at 0.0991",
              device, baseline_ms, ours_ms)
