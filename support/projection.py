"""Features in two dimensions, for a map: t-SNE, or the two principal components where films are few or very many."""

import numpy as np

MOST = 5000  # films that t-SNE takes, about 45 s of one core; more get principal components
FEWEST = 10
COMPONENTS = 50  # that t-SNE is given, as its authors do


def principal(x, dims):
    """The first principal components of x [n, D], scaled as in x -> float32 [n, <= dims]."""
    x = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    if len(x) > x.shape[1]:
        _, directions = np.linalg.eigh(x.T @ x)
        return (x @ directions[:, ::-1][:, :dims]).astype(np.float32)
    values, directions = np.linalg.eigh(x @ x.T)  # of fewer films than dimensions
    return (directions[:, ::-1] * np.sqrt(values[::-1].clip(min=0)))[:, :dims].astype(np.float32)


def flat_map(features, seed=0):
    """Unit features [n, D] -> places float32 [n, 2] within 0..1, near where the features are near, and the method."""
    x = principal(np.asarray(features), COMPONENTS)
    x = np.pad(x, ((0, 0), (0, max(0, 2 - x.shape[1]))))
    spread = np.ptp(x, axis=0).max(initial=0)
    method = "t-SNE" if FEWEST <= len(x) <= MOST and spread > 1e-6 else "PCA"
    if method == "t-SNE":
        from sklearn.manifold import TSNE  # here: its import takes a second

        x = TSNE(init="pca", perplexity=min(30, (len(x) - 1) / 3), random_state=seed).fit_transform(x)
    x = x[:, :2]
    middle, size = (x.min(0) + x.max(0)) / 2, max(np.ptp(x, axis=0).max(), 1e-6)
    return (0.5 + (x - middle) / size).astype(np.float32).clip(0, 1), method
