"""Row of the bench about the flow: TV-L1 of pairs of 320x240 from the films of --videos, else from generated texture.

TV-L1      against OpenCV's. On the CPU one pair a core; on a GPU batches of some 256 pairs against one core. Also a
           number of iterations by itself, since scales, warps and stops depend on the film. It has no floor: the data
           of a pair fits in the cache, so that the bandwidth of the memory bounds nothing.
DIS, Farneback  against TV-L1, both on one core, with the mean end-point distance between them.
storage    time to read a field, bytes and mean error of u and v: the format of the stores, against PNG. "Added" is the
           error beyond that of the 8 bits.

About two and a half minutes on one core.
"""

import concurrent.futures
import itertools
import os

import cv2
import numpy as np
import torch

import tvl1
from experiments.bench.measure import in_turns, row
from support.flow_methods import make_settings, make_solver
from support.stores import BOUND, dequantise, quantise
from support.videos import decode, find_videos

GPU_PAIRS = 256  # pairs at once on a GPU, about
NEAR = 0.02 if int(cv2.__version__.split(".")[0]) >= 5 else 0.03  # px; OpenCV 4 rounds its warps to 1/32 px


def pairs_of_films(videos):
    """(name, uint8 [P, 2, 240, 320]): the sixth and seventh frame of up to 3 clips of each folder below `videos`."""
    sets = {}
    for name, path in (find_videos(videos) if videos else {}).items():
        sets.setdefault(name.split(os.sep)[0], []).append(path)
    for name, paths in sets.items():
        films = [list(itertools.islice(decode(path), 5, 7)) for path in paths[:3]]
        yield name, np.stack([[cv2.resize(cv2.cvtColor(f, cv2.COLOR_BGR2GRAY), (320, 240),
                                          interpolation=cv2.INTER_AREA) for f in film] for film in films])
    if not sets:
        noise = np.random.default_rng(0).normal(size=(260, 340)).astype(np.float32)
        big = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
        yield "generated texture", np.stack([[big[8:248, 8:328], big[6:246, 5:325]]])


def store_formats(flows):
    """Rows of what a store costs in bytes, error and time to read. flows float32 [P, 2, h, w]."""
    planes = np.stack([quantise(np.concatenate(list(flow))) for flow in flows])  # [P, 2h, w]
    h, w = flows.shape[2:]
    colours = [np.dstack([*np.split(plane, 2), np.full((h, w), 128, np.uint8)]) for plane in planes]
    exact, clipped = dequantise(planes), np.clip(flows, -BOUND, BOUND).reshape(planes.shape)

    def grey(file):
        return cv2.imdecode(file, cv2.IMREAD_GRAYSCALE)

    def colour(file):
        u, v, _ = cv2.split(cv2.imdecode(file, cv2.IMREAD_COLOR))
        return np.concatenate([u, v])

    formats = {"PNG": (planes, ".png", [], grey)} | {
        f"{name} JPEG, quality {quality}": (images, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality], read)
        for name, images, read in (("one grey", planes, grey), ("u, v, 128 as one colour", colours, colour))
        for quality in (95, 100)}
    files = {name: [cv2.imencode(suffix, image, how)[1] for image in images]
             for name, (images, suffix, how, _) in formats.items()}
    times = in_turns([lambda name=name: [formats[name][3](file) for file in files[name]] for name in formats],
                     torch.device("cpu"), seconds=1)
    for name, ms in zip(formats, times, strict=True):
        read = dequantise(np.stack([formats[name][3](file) for file in files[name]]))
        error, added = (np.abs(read - other).mean() for other in (clipped, exact))
        yield row("flow", f"stored as {name}: {np.mean([len(x) for x in files[name]]) / 1e3:.1f} kB a field, error "
                          f"{error:.3f} px, {added:.3f} added; time to read, against PNG", torch.device("cpu"),
                  times[0] / len(flows), ms / len(flows))


def faster_methods(name, pairs, flows):
    """Rows of DIS and Farneback against our TV-L1 of pairs uint8 [P, 2, h, w], `flows` [P, 2, h, w], on one core."""
    threads, pairs = torch.get_num_threads(), torch.from_numpy(pairs)
    torch.set_num_threads(1)
    try:
        for method in ("dis", "farneback"):
            settings = make_settings(method=method)
            solve = make_solver(settings)
            motion = np.linalg.norm(flows, axis=1).mean()
            distance = np.linalg.norm(solve(pairs).numpy() - flows, axis=1).mean()
            theirs_ms, ours_ms = in_turns([lambda: tvl1.flow(pairs, impl="compiled"), lambda f=solve: f(pairs)],
                                          torch.device("cpu"), seconds=0, least=3)
            yield row("flow", f"{settings['method']}, {distance:.3f} px from TV-L1 (mean motion {motion:.2f} px), "
                              f"against our TV-L1: {len(pairs)} pairs of 320x240, {name}", torch.device("cpu"),
                      theirs_ms, ours_ms)
    finally:
        torch.set_num_threads(threads)


def flow(device, videos):
    on_gpu = device.type == "cuda"
    threads = 1 if on_gpu else torch.get_num_threads()
    cv2.setNumThreads(1)

    def baseline(pairs, iterations=None):
        def one(pair):
            solver = cv2.optflow.DualTVL1OpticalFlow_create(**iterations or {})
            return solver.calc(*pair, None).transpose(2, 0, 1)

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            return np.stack(list(pool.map(one, pairs)))

    all_flows = []
    for name, pairs in pairs_of_films(videos):
        times = -(-GPU_PAIRS // len(pairs)) if on_gpu else 1
        frames = torch.from_numpy(pairs).to(device).repeat(times, 1, 1, 1)
        flows, theirs = tvl1.flow(frames, impl="compiled")[:len(pairs), 0].cpu().numpy(), baseline(pairs)
        distance = np.linalg.norm(flows - theirs, axis=1).mean()
        assert distance < NEAR, f"{name}: {distance:.4f} px from OpenCV"
        baseline_ms, ours_ms = in_turns([lambda x=pairs: baseline(x),
                                         lambda x=frames: tvl1.flow(x, impl="compiled")], device, seconds=0, least=3)
        yield row("flow", f"{len(frames)} pairs of 320x240, {name}, {distance:.5f} px apart, "
                          f"{len(frames) / ours_ms * 1e3:.1f} pairs/s", device, baseline_ms * times, ours_ms)
        yield from faster_methods(name, pairs, theirs)
        all_flows.append(theirs)
    yield from store_formats(np.concatenate(all_flows))

    alone = dict(scales=1, warps=1, epsilon=0.0, inner=100, outer=1, median=1)
    theirs = dict(nscales=1, warps=1, epsilon=0, innnerIterations=100, outerIterations=1, medianFiltering=1)
    baseline_ms, ours_ms = in_turns([lambda: baseline(pairs[:1], theirs),
                                     lambda: tvl1.flow(frames[:1], impl="compiled", **alone)], device, seconds=0)
    yield row("flow", "100 iterations of one pair of 320x240", device, baseline_ms, ours_ms)
