"""Every claim of speed as a ratio against its baseline, both measured in one run: `python -m experiments.bench`.

In   rows to run (all by default): operator flow
Out  a table, and with --json FILE a list of objects {row, case, device, threads, baseline_ms, ours_ms, ratio, floor_ms}

Ours and the baseline take turns and the medians are compared, so that a neighbour's load meets both. Each row first
checks that both compute the same. floor_ms is what the machine can't go below: the bytes that must move over the
bandwidth it measures, or the exponentials over the rate it measures, whichever is longer.

operator  guided loss, forward and backward, float32. Baseline: the way of the released code, written from its
          description: one Sinkhorn a call in the exp domain, the log-softmax again for each pair of crops, autograd.
          About 40 seconds.
flow      TV-L1 of pairs of 320x240, from the real clips where they are at hand (../shared/data), else from generated
          texture. Baseline: OpenCV's, one pair a core. The floor is known for a number of iterations alone (scales,
          warps and stops depend on the film): 3 divisions and 2 square roots in double a pixel, or 64 bytes. About two
          minutes on one core.
"""

import argparse
import concurrent.futures
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch

import goca
import tvl1
from data import VIDEO_SUFFIXES, atomic, command_line, decode

# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def in_turns(calls, device, seconds=4.0, least=5):
    """Median milliseconds of each call, taking turns for about `seconds` and at least `least` rounds."""

    def once(call):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    for call in calls:  # warm-up: first calls allocate
        once(call), once(call)
    times = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(times[0]) < least or time.perf_counter() < end:
        for call, ts in zip(calls, times, strict=True):
            ts.append(once(call))
    return [statistics.median(ts) for ts in times]


def machine_rates(device):
    """(bytes a second of a copy in memory, float32 exponentials a second on data in cache), with all threads."""
    source = torch.rand(2**25, device=device)
    target = torch.empty_like(source)
    small = torch.rand(2**17 if device.type == "cpu" else 2**22, device=device)
    copied, raised = in_turns([lambda: target.copy_(source), lambda: [torch.exp(small, out=target[:small.numel()])
                                                                      for _ in range(20)]], device, seconds=2)
    return 2 * 4 * source.numel() / (copied / 1e3), 20 * small.numel() / (raised / 1e3)


def row(name, case, device, baseline_ms, ours_ms, floor_ms=None):
    return {"row": name, "case": case, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "threads": torch.get_num_threads(), "baseline_ms": round(baseline_ms, 4), "ours_ms": round(ours_ms, 4),
            "ratio": round(baseline_ms / ours_ms, 2), "floor_ms": None if floor_ms is None else round(floor_ms, 4)}


# ---------------------------------------------------------------------------------------------------------------------
# operator
# ---------------------------------------------------------------------------------------------------------------------
def exp_domain_sinkhorn(q, rounds):
    """Sinkhorn on exponentials, prototypes then samples each round; q [M, N] -> rows that sum to 1."""
    q = q.T
    q = q / q.sum()
    k, b = q.shape
    for _ in range(rounds):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


def exp_domain_loss(scores, lambda1=0.02, lambda2=0.03, rounds=3, assigning=2, temperature=0.1):
    """The guided loss crop by crop and pair by pair, scores [2, V, M, N]; the prior's sign is the paper's."""
    loss = 0
    for crop in range(assigning):
        with torch.no_grad():
            first = [exp_domain_sinkhorn((scores[view, crop] / lambda1).exp(), rounds) for view in range(2)]
            last = [exp_domain_sinkhorn(((scores[view, crop] + lambda2 * first[1 - view].log())
                                         / (lambda1 + lambda2)).exp(), rounds) for view in range(2)]
        for view in range(2):
            for other in set(range(scores.shape[1])) - {crop}:
                log_g = torch.log_softmax(scores[view, other] / temperature, dim=1)
                loss = loss - (last[view] * log_g).sum(1).mean()
    return loss / (2 * assigning * (scores.shape[1] - 1))


def operator(device):
    bandwidth, exp_rate = machine_rates(device)
    print(f"{bandwidth / 1e9:.1f} GB/s copied, {exp_rate / 1e9:.2f} G exponentials/s", file=sys.stderr)
    crops, n = 6, 1000
    for m in (10, 64, 640, 4096):
        g = torch.Generator().manual_seed(m)
        features = torch.nn.functional.normalize(torch.randn(2, crops, m, 128, generator=g), dim=-1)
        prototypes = torch.nn.functional.normalize(torch.randn(n, 128, generator=g), dim=-1)
        scores = (features @ prototypes.T).to(device).requires_grad_()

        def step(loss, x=scores):
            x.grad = None
            value = loss(x)
            value.backward()
            return value.detach(), x.grad

        def ours(x=scores):
            return step(lambda y: goca.guided_loss(y, impl="compiled", check_finite=False), x)

        def baseline(x=scores):
            return step(exp_domain_loss, x)

        for a, b in zip(ours(), baseline(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 / m)
        baseline_ms, ours_ms = in_turns([baseline, ours], device)
        entries = m * n * 2 * crops
        floor = max(2 * 4 * entries / bandwidth, (entries + 2 * m * n * 4) / exp_rate)
        yield row("operator", f"guided loss, forward + backward, M={m} N={n}, 2 views, {crops} crops, 2 assigning",
                  device, baseline_ms, ours_ms, 1e3 * floor)


# ---------------------------------------------------------------------------------------------------------------------
# flow
# ---------------------------------------------------------------------------------------------------------------------
CLIPS = Path(__file__).parents[2] / "shared" / "data"


def pairs_of_films():
    """(name, uint8 [P, 2, 240, 320]) of each data set at hand: the sixth and seventh frame of up to 3 clips."""
    found = False
    for name in ("ucf101", "hmdb51", "kinetics400"):
        paths = sorted(p for p in (CLIPS / name / "videos").rglob("*") if p.suffix in VIDEO_SUFFIXES)[:3]
        films = [list(itertools.islice(decode(path), 5, 7)) for path in paths]
        if films:
            found = True
            yield name, np.stack([[cv2.resize(cv2.cvtColor(f, cv2.COLOR_BGR2GRAY), (320, 240),
                                              interpolation=cv2.INTER_AREA) for f in film] for film in films])
    if not found:
        noise = np.random.default_rng(0).normal(size=(260, 340)).astype(np.float32)
        big = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
        yield "generated texture", np.stack([[big[8:248, 8:328], big[6:246, 5:325]]])


def flow(device):
    threads = torch.get_num_threads()
    cv2.setNumThreads(1)

    def baseline(pairs, iterations=None):
        def one(pair):
            solver = cv2.optflow.DualTVL1OpticalFlow_create(**iterations or {})
            return solver.calc(*pair, None).transpose(2, 0, 1)

        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            return np.stack(list(pool.map(one, pairs)))

    for name, pairs in pairs_of_films():
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


ROWS = {"operator": operator, "flow": flow}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"from: {' '.join(ROWS)} (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the rows as a JSON list")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu or cuda (default: %(default)s)")
    args = parser.parse_args()
    if unknown := set(args.rows) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are: {' '.join(ROWS)}")
    rows = []
    for name in args.rows or ROWS:
        for result in ROWS[name](torch.device(args.device)):
            rows.append(result)
            floor = "" if result["floor_ms"] is None else f", floor {result['floor_ms']:.3f} ms"
            print(f"{name}: {result['case']} [{result['device']}, {result['threads']} threads]: baseline "
                  f"{result['baseline_ms']:.3f} ms, ours {result['ours_ms']:.3f} ms, {result['ratio']:.1f}x{floor}",
                  flush=True)
    if args.json:
        with atomic(args.json) as path:
            path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    command_line(main)
