"""Numbers by hand, against loops and against scikit-learn."""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from sklearn import metrics as sk
from sklearn.cluster import KMeans

from support import kmeans, metrics


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def blobs(n, d, classes, spread, seed=0):
    """Points about class means -> unit rows [n, d], classes [n]."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    means = torch.randn(classes, d, generator=g)
    return F.normalize(means[y] + spread * torch.randn(n, d, generator=g), dim=1), y


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval and accuracy
# ---------------------------------------------------------------------------------------------------------------------
def test_recall_by_hand():
    gallery = torch.tensor([0] * 6 + [1] * 6)
    queries = torch.tensor([0, 1])
    near = torch.tensor([[0, 6, 7, 8, 9, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]])
    r = metrics.recall(near, queries, gallery)
    assert r["R@1"] == 50 and r["R@5"] == 100 and "R@20" not in r
    assert r["R@1 standard error"] == pytest.approx(100 * math.sqrt(0.25 / 2))
    assert r["R@1 chance"] == pytest.approx(50)
    assert r["R@5 chance"] == pytest.approx(100 * (1 - math.comb(6, 5) / math.comb(12, 5)))
    assert r["R@10 chance"] == pytest.approx(100)


def test_nearest_is_the_loop_over_queries_whatever_the_tile(monkeypatch):
    q, g = unit(103, 8), unit(30, 8, seed=1)
    for k in (5, 30):
        expected = torch.stack([(g @ x).argsort(descending=True)[:k] for x in q])
        for tile in (metrics.TILE, (7, 11), (200, 4), (1, 1)):  # one tile; tiles narrower than k too
            monkeypatch.setattr(metrics, "TILE", tile)
            assert torch.equal(metrics.nearest(q, g, k), expected)


def test_similarities_held_do_not_grow_with_the_gallery(monkeypatch):
    seen = []
    matmul = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: (seen.append((len(a), b.shape[1])), matmul(a, b))[1])
    monkeypatch.setattr(metrics, "TILE", (10, 20))
    metrics.nearest(unit(25, 4), unit(1010, 4), 3)
    assert sum(a * b for a, b in seen) == 25 * 1010 and max(a for a, _ in seen) == 10 and max(b for _, b in seen) < 40


def test_equal_similarities_are_neighbours_once_each():
    g = unit(40, 8).repeat_interleave(3, dim=0)  # every row three times
    near = metrics.nearest(g, g, 3)
    assert torch.equal(near.sort(dim=1).values // 3, torch.arange(120)[:, None].expand(-1, 3) // 3)
    assert near.sort(dim=1).values.diff(dim=1).min() == 1


def test_accuracy_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.1, 0.06, 0.03, 0.01]] * 4)
    r = metrics.accuracy(p, torch.tensor([0, 1, 5, 0]))
    assert (r["top-1"], r["top-5"]) == (50, 75)
    assert r["top-1 standard error"] == pytest.approx(25)


# ---------------------------------------------------------------------------------------------------------------------
# k-means
# ---------------------------------------------------------------------------------------------------------------------
def inertia_of(x, labels, k):
    means = torch.stack([x[labels == c].double().mean(0) for c in range(k)])
    return (x.double() - means[labels]).square().sum().item()


@pytest.mark.parametrize("gram", [2**14, 10])  # with all inner products at hand, and without
def test_kmeans_ends_where_lloyd_ends(monkeypatch, gram):
    monkeypatch.setattr(kmeans, "GRAM", gram)
    x, _ = blobs(300, 16, 12, 0.7)
    labels, inertia = kmeans.kmeans(x, 12, runs=7)
    assert labels.shape == (7, 300) and len({tuple(r) for r in labels.tolist()}) > 1  # starts differ
    for r, value in zip(labels, inertia, strict=True):
        assert len(r.unique()) == 12
        assert value.item() == pytest.approx(inertia_of(x, r, 12), rel=1e-9)
        means = torch.stack([x[r == c].mean(0) for c in range(12)])
        again = KMeans(12, init=means.numpy(), n_init=1, tol=0).fit(x.numpy())  # one more run from here moves nothing
        assert np.array_equal(again.labels_, r)


def test_kmeans_is_as_good_as_scikit_learn():
    x, _ = blobs(600, 24, 20, 1.0)
    _, ours = kmeans.kmeans(x, 20, runs=40)
    theirs = [KMeans(20, n_init=1, random_state=i).fit(x.numpy()).inertia_ for i in range(40)]
    error = math.hypot(ours.std().item(), np.std(theirs)) / 40**0.5
    assert ours.mean().item() < np.mean(theirs) + 2 * error


def test_runs_in_groups_are_the_same_runs(monkeypatch):
    x, _ = blobs(100, 8, 5, 0.8)
    together = kmeans.kmeans(x, 5, runs=6)
    monkeypatch.setattr(kmeans, "BLOCK", 300)  # groups of 2
    apart = kmeans.kmeans(x, 5, runs=6)
    assert torch.equal(together[0], apart[0]) and torch.equal(together[1], apart[1])


def test_kmeans_with_fewer_places_than_clusters_leaves_no_cluster_empty():
    x = unit(3, 4).repeat(10, 1)  # 30 points in 3 places
    labels, inertia = kmeans.kmeans(x, 5, runs=3, max_iter=20)
    assert inertia.abs().max() < 1e-5 and all(len(r.unique()) >= 3 for r in labels)
    assert kmeans.kmeans(x[:3], 3, runs=2)[1].abs().max() < 1e-5
    with pytest.raises(ValueError, match="3 points can't make 4 clusters"):
        kmeans.kmeans(x[:3], 4, runs=1)


@pytest.mark.parametrize("afresh", [False, True])  # as on the CPU, as on a GPU
def test_sums_are_those_of_the_new_labels(afresh):
    x, g = unit(50, 6), torch.Generator().manual_seed(3)
    a, b = (torch.randint(4, (3, 50), generator=g) for _ in range(2))
    s = kmeans.ClusterSums(x, a, 4, afresh)
    s.update(a, b)
    for r in range(3):
        for c in range(4):
            torch.testing.assert_close(s.sums[r, c], x[b[r] == c].sum(0))
            assert s.counts[r, c] == (b[r] == c).sum()


def test_cluster_scores_are_scikit_learns():
    g = torch.Generator().manual_seed(0)
    truth = torch.randint(6, (200,), generator=g)
    labels = torch.where(torch.rand(5, 200, generator=g) < 0.6, truth % 5, torch.randint(7, (5, 200), generator=g))
    scores = metrics.cluster_scores(labels, truth, 7)
    for r, row in enumerate(labels.numpy()):
        major = np.array([np.bincount(truth[row == c], minlength=6).argmax() if (row == c).any() else 0
                          for c in range(7)])[row]
        assert scores["Acc"][r] == pytest.approx(100 * sk.accuracy_score(truth, major))
        assert scores["NMI"][r] == pytest.approx(100 * sk.normalized_mutual_info_score(truth, row))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a class that no cluster names
            assert scores["F1"][r] == pytest.approx(100 * sk.f1_score(truth, major, average="macro"))
            assert scores["F1 weighted"][r] == pytest.approx(100 * sk.f1_score(truth, major, average="weighted"))
        table = sk.cluster.contingency_matrix(truth, row)
        assert scores["Acc one-to-one"][r] == pytest.approx(
            table[linear_sum_assignment(table, maximize=True)].sum() / 2)


def test_perfect_and_void_clusterings():
    truth = torch.tensor([0, 0, 1, 1, 2, 2])
    s = metrics.cluster_scores(torch.stack([(truth + 1) % 3, torch.zeros(6, dtype=torch.int64)]), truth, 3)
    for name, value in s.items():
        assert value[0].item() == pytest.approx(100), name
    assert s["Acc"][1] == pytest.approx(100 / 3) and s["NMI"][1] == pytest.approx(0, abs=1e-9)
