"""Row of bench.py about the flow: TV-L1 of pairs of 320x240 from the films of --videos, else from generated texture.

Baseline: OpenCV's, one pair a core. The floor is known for a number of iterations alone (scales, warps and stops depend
on the film): 3 divisions and 2 square roots in double a pixel, or 64 bytes. About two minutes on one core.
"""

import concurrent.futures
import itertools
import os

import cv2
import numpy as np
import torch

import tvl1
from data import decode, find_videos
from experiments.measure import in_turns, machine_rates, row


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


def flow(device, videos):
    threads = torch.get_num_threads()
    cv2.setNumThreads(1)

    def baseline(pairs, iterations=None):
        def one(pair):
            solver = cv2.optflow.DualTVL1OpticalFlow_create(**iterations or {})
            return solver.calc(*pair, None).transpose(2, 0, 1)

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            return np.stack(list(pool.map(one, pairs)))

    for name, pairs in pairs_of_films(videos):
        frames = torch.from_numpy(pairs).to(device)
        distance = np.linalg.norm(tvl1.flow(frames, impl="compiled")[:, 0].cpu().numpy() - baseline(pairs), axis=1)
        assert distance.mean() < 0.02, f"{name}: {distance.mean():.4f} px from OpenCV"
        baseline_ms, ours_ms = in_turns([lambda x=pairs: baseline(x),
                                         lambda x=frames: tvl1.flow(x, impl="compiled")], device, seconds=0, least=3)
        yield row("flow", f"{len(pairs)} pairs of 320x240, {name}", device, baseline_ms, ours_ms)

    alone = dict(scales=1, warps=1, epsilon=0.0, inner=100, outer=1, median=1)
    theirs = dict(nscales=1, warps=1, epsilon=0, innnerIterations=100, outerIterations=1, medianFiltering=1)
    baseline_ms, ours_ms = in_turns([lambda: baseline(pairs[:1], theirs),
                                     lambda: tvl1.flow(frames[:1], impl="compiled", **alone)], device, seconds=0)
    bandwidth, _ = machine_rates(device)
    single, double = (torch.rand(2**16, device=device, dtype=t) + 1 for t in (torch.float32, torch.float64))
    to = torch.empty_like(single), torch.empty_like(double)
    divided, rooted = in_turns([lambda: [torch.reciprocal(single, out=to[0]) for _ in range(20)],
                                lambda: [torch.sqrt(double, out=to[1]) for _ in range(20)]], device, seconds=1)
    pixels = 100 * 240 * 320
    floor = max(64 * pixels / bandwidth * 1e3, (3 * divided + 2 * rooted) / 20 / single.numel() * pixels)
    yield row("flow", "100 iterations of one pair of 320x240", device, baseline_ms, ours_ms, floor)
