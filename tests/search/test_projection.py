"""Features in two dimensions."""

import numpy as np
import pytest

from support import projection
from support.projection import flat_map, principal


@pytest.mark.parametrize("n, d", [(40, 6), (6, 40)])  # both ways of computing them
def test_principal_components_are_those_of_the_svd(n, d):
    x = np.random.default_rng(0).standard_normal((n, d)) * np.linspace(5, 1, d) + 3
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    assert np.allclose(np.abs(principal(x, 3)), np.abs(u * s)[:, :3], atol=1e-4)


def clusters(n, d=32):
    """n films in two far clusters, one after the other."""
    x = np.random.default_rng(0).standard_normal((n, d)).astype(np.float32) * 0.05
    x[:n // 2, 0] += 1
    x[n // 2:, 1] += 1
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("n, method", [(8, "PCA"), (60, "t-SNE")])
def test_what_is_near_stays_near(n, method):
    places, used = flat_map(clusters(n))
    assert used == method and places.shape == (n, 2) and places.dtype == np.float32
    assert places.min() >= 0 and places.max() <= 1 and np.ptp(places, axis=0).max() == pytest.approx(1)
    a, b = places[:n // 2], places[n // 2:]
    gap = np.linalg.norm(a.mean(0) - b.mean(0))
    assert gap > 2 * max(np.linalg.norm(p - p.mean(0), axis=1).max() for p in (a, b))


def test_the_same_seed_gives_the_same_map():
    x = clusters(60)
    assert (flat_map(x)[0] == flat_map(x)[0]).all()


def test_very_many_films_get_principal_components(monkeypatch):
    monkeypatch.setattr(projection, "MOST", 59)
    assert flat_map(clusters(60))[1] == "PCA"


@pytest.mark.parametrize("x", [np.ones((1, 4)), np.ones((2, 4)), np.ones((30, 4)), np.arange(20.0)[:, None]])
def test_degenerate_collections(x):
    places, _ = flat_map(x)
    assert places.shape == (len(x), 2) and np.isfinite(places).all() and (places >= 0).all() and (places <= 1).all()
    if np.ptp(x) == 0:
        assert np.allclose(places, 0.5, atol=1e-3)
