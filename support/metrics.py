"""What the features are worth: nearest neighbours, and the numbers made of neighbours, clusters and classes.

Retrieval (section 4.2): `nearest`, `recall`. Clusters (section 4.3): `cluster_scores`. Classification (section 4.4):
`accuracy`. Everything is exact: no index, no sampling. evaluate.py holds the commands.
"""

import math

import numpy as np
import torch

KS = (1, 5, 10, 20, 50)
TILE = 1024, 4096  # queries and gallery rows whose similarities are held at a time: 16 MiB in float32


def nearest(queries, gallery, k):
    """The k nearest gallery rows of each query by inner product, nearest first: [q, D], [g, D] -> int64 [q, k].

    One matrix product in tiles that stay in the cache; a query's k best so far go from tile to tile, so memory does not
    grow with the gallery. Of equal similarities either may come first.
    """
    tiles = gallery.tensor_split(max(1, round(len(gallery) / TILE[1])))
    out = []
    for q in queries.split(TILE[0]):
        best, places, at = q.new_empty(len(q), 0), torch.empty(len(q), 0, dtype=torch.int64, device=q.device), 0
        for tile in tiles:
            values, i = (q @ tile.T).topk(min(k, len(tile)), dim=1)
            values, places = torch.cat([best, values], dim=1), torch.cat([places, i + at], dim=1)
            best, i = values.topk(min(k, values.shape[1]), dim=1)
            places, at = places.gather(1, i), at + len(tile)
        out.append(places)
    return torch.cat(out)


def recall(neighbours, query_labels, gallery_labels):
    """R@k in percent for k in KS that the gallery allows, with standard errors and chance.

    neighbours [q, K]; labels int64 [q], [g]. Chance is that of k gallery videos drawn at random.
    """
    right = gallery_labels[neighbours] == query_labels[:, None]  # [q, K]
    out, g, q = {}, len(gallery_labels), len(query_labels)
    others = g - torch.bincount(gallery_labels, minlength=int(query_labels.max()) + 1)[query_labels].double()
    for k in (k for k in KS if k <= neighbours.shape[1]):
        hit = right[:, :k].any(1).double().mean().item()
        i = torch.arange(k, dtype=torch.float64)
        miss = ((others[:, None] - i).clamp(min=0) / (g - i)).prod(1)  # C(others, k) / C(g, k)
        out |= {f"R@{k}": 100 * hit, f"R@{k} standard error": 100 * math.sqrt(hit * (1 - hit) / q),
                f"R@{k} chance": 100 * (1 - miss.mean().item())}
    return out


def accuracy(probabilities, labels):
    """Top-1 and top-5 accuracy in percent with standard errors: [n, classes], int64 [n] -> dict."""
    out = {}
    for k in (k for k in (1, 5) if k <= probabilities.shape[1]):
        hit = (probabilities.topk(k, dim=1).indices == labels[:, None]).any(1).double().mean().item()
        out |= {f"top-{k}": 100 * hit, f"top-{k} standard error": 100 * math.sqrt(hit * (1 - hit) / len(labels))}
    return out


def cluster_scores(labels, truth, k):
    """Acc, NMI and F1 (section 4.3) in percent of clusterings [R, n] against classes [n] -> {name: float64 [R]}.

    Each cluster takes the class of most of its members. Acc: share of right members; "Acc one-to-one": where each class
    may name one cluster only (Hungarian). NMI: over the arithmetic mean of both entropies. F1: mean over classes;
    "F1 weighted": by their members.
    """
    from scipy.optimize import linear_sum_assignment  # here: a second of start that other commands don't need
    from sklearn.metrics import f1_score, normalized_mutual_info_score

    truth, scores = truth.cpu().numpy(), []
    for run in labels.cpu().numpy():
        table = np.zeros((k, truth.max() + 1), np.int64)  # [cluster, class]: members
        np.add.at(table, (run, truth), 1)
        named = table.argmax(1)[run]  # [n]: the class of each one's cluster; the first of equals
        one_to_one = table[linear_sum_assignment(table, maximize=True)].sum()
        scores.append({"Acc": (named == truth).mean(), "NMI": normalized_mutual_info_score(truth, run),
                       "F1": f1_score(truth, named, average="macro"), "Acc one-to-one": one_to_one / len(truth),
                       "F1 weighted": f1_score(truth, named, average="weighted")})
    return {name: 100 * torch.tensor([s[name] for s in scores], dtype=torch.float64) for name in scores[0]}
