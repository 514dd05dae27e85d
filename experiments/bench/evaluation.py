"""Rows of the bench about the evaluation: retrieval and k-means.

Retrieval of 50 neighbours, 3783 queries in a gallery of 9537, 1024-d (UCF101, S3D), and 50 runs of k-means with 101
clusters on the queries. Baselines: a loop over the queries, timed on 20 of them (with F.cosine_similarity, and with
unit rows and one product a query); scikit-learn's KMeans, timed run by run. Times of samples are multiplied up. About
2 minutes; on busy cores OMP_NUM_THREADS=1 is the fairer setting, since scikit-learn's threads wait for one another.
"""

import statistics
import sys

import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

from experiments.bench.measure import in_turns, row
from support.kmeans import kmeans
from support.metrics import nearest


def class_features(n, classes=101, dim=1024, seed=0):
    """Unit features [n, dim] scattered about class means, about as mixed as a trained network's."""
    g = torch.Generator().manual_seed(0)
    means, spread = torch.randn(classes, 64, generator=g), torch.randn(64, dim, generator=g)
    g.manual_seed(seed + 1)
    x = means[torch.arange(n) % classes] + 2.2 * torch.randn(n, 64, generator=g)
    return F.normalize(x @ spread + 3 * torch.randn(n, dim, generator=g), dim=1)


def evaluation(device, videos):
    gallery, queries, sample = class_features(9537, seed=1).to(device), class_features(3783, seed=2).to(device), 20

    def cosine_loop():
        return [F.cosine_similarity(q[None], gallery).topk(50) for q in queries[:sample]]

    def product_loop():
        return [(gallery @ q).topk(50) for q in queries[:sample]]

    def ours():
        return nearest(queries, gallery, 50)

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

    loop_ms, ours_ms = in_turns([scikit_learn, lambda: kmeans(queries, 101, 50)], device, least=3)
    mean = kmeans(queries, 101, 50)[1].mean().item()
    print(f"mean inertia: ours {mean:.2f}, scikit-learn {statistics.mean(inertia):.2f} ({len(inertia)} runs)",
          file=sys.stderr)
    if mean > statistics.mean(inertia) + 2 * statistics.stdev(inertia) / len(inertia) ** 0.5:
        raise AssertionError("our k-means ends higher than scikit-learn's")
    yield row("evaluation", "k-means, 50 runs of 101 clusters on 3783 x 1024; scikit-learn", device,
              loop_ms * 50, ours_ms)
