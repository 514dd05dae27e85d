"""Every claim of speed as a ratio against its baseline, both measured in one run: `python -m experiments.bench`.

In   rows to run (all by default): operator evaluation
Out  a table, and with --json FILE a list of objects {row, case, device, threads, baseline_ms, ours_ms, ratio, floor_ms}

Ours and the baseline take turns and the medians are compared, so that a neighbour's load meets both. Each row first
checks that both compute the same. floor_ms is what the machine can't go below: the bytes that must move over the
bandwidth it measures, the exponentials or the products over the rate it measures, whichever is longest.

operator  guided loss, forward and backward, float32. Baseline: the way of the released code, written from its
          description: one Sinkhorn a call in the exp domain, the log-softmax again for each pair of crops, autograd.
          About 40 seconds.
evaluation  retrieval of 50 neighbours, 3783 queries in a gallery of 9537, 1024-d (UCF101, S3D), and 50 runs of k-means
          with 101 clusters on the queries. Baselines: a loop over the queries, timed on 20 of them (with
          F.cosine_similarity, and with unit rows and one product a query); scikit-learn's KMeans, timed run by
          run. Times of samples are multiplied up. About 2 minutes; on busy cores OMP_NUM_THREADS=1 is the fairer
          setting, since scikit-learn's threads wait for one another.
"""

import argparse
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

import goca
import metrics
from data import atomic, command_line

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
# evaluation
# ---------------------------------------------------------------------------------------------------------------------
def class_features(n, classes=101, dim=1024, seed=0):
    """Unit features [n, dim] scattered about class means, about as mixed as a trained network's."""
    g = torch.Generator().manual_seed(0)
    means, spread = torch.randn(classes, 64, generator=g), torch.randn(64, dim, generator=g)
    g.manual_seed(seed + 1)
    x = means[torch.arange(n) % classes] + 2.2 * torch.randn(n, 64, generator=g)
    return F.normalize(x @ spread + 3 * torch.randn(n, dim, generator=g), dim=1)


def evaluation(device):
    gallery, queries, sample = class_features(9537, seed=1).to(device), class_features(3783, seed=2).to(device), 20

    def cosine_loop():
        return [F.cosine_similarity(q[None], gallery).topk(50) for q in queries[:sample]]

    def product_loop():
        return [(gallery @ q).topk(50) for q in queries[:sample]]

    def ours():
        return metrics.nearest(queries, gallery, 50)

    found = (queries[:sample, None] * gallery[ours()[:sample]]).sum(2)  # the similarities of our neighbours
    for loop in (cosine_loop, product_loop):
        torch.testing.assert_close(found, torch.stack([near.values for near in loop()]), rtol=0, atol=1e-5)
    square = gallery[:2048]  # a product that large runs at the machine's rate
    cosine_ms, product_ms, ours_ms, square_ms = in_turns([cosine_loop, product_loop, ours, lambda: square @ square.T],
                                                         device)
    floor = square_ms * len(queries) * len(gallery) / len(square) ** 2
    for name, ms in (("F.cosine_similarity a query", cosine_ms), ("a product a query", product_ms)):
        yield row("evaluation", f"50 nearest, 3783 queries x 9537 x 1024; loop: {name}", device,
                  ms * len(queries) / sample, ours_ms, floor)

    points, inertia = queries.cpu().numpy(), []

    def scikit_learn():
        inertia.append(KMeans(101, n_init=1, random_state=len(inertia)).fit(points).inertia_)

    loop_ms, ours_ms = in_turns([scikit_learn, lambda: metrics.kmeans(queries, 101, 50)], device, least=3)
    mean = metrics.kmeans(queries, 101, 50)[1].mean().item()
    print(f"mean inertia: ours {mean:.2f}, scikit-learn {statistics.mean(inertia):.2f} ({len(inertia)} runs)",
          file=sys.stderr)
    if mean > statistics.mean(inertia) + 2 * statistics.stdev(inertia) / len(inertia) ** 0.5:
        raise AssertionError("our k-means ends higher than scikit-learn's")
    yield row("evaluation", "k-means, 50 runs of 101 clusters on 3783 x 1024; scikit-learn", device,
              loop_ms * 50, ours_ms)


ROWS = {"operator": operator, "evaluation": evaluation}


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
