"""Groups of a collection without labels: k-means of unit features, and how far it can be trusted."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from support.kmeans import kmeans

STARTS = 20  # of k-means
SAMPLE = 5000  # entries on which the silhouette is computed


class Groups(NamedTuple):
    """k-means of an index, the largest group first."""

    members: list  # of lists of entries, most typical first
    tightness: list  # mean cosine of a group's members with its centre
    silhouette: float | None  # mean over entries; None where each is a group of its own, or all are one
    agreement: float  # of the other starts with the best, adjusted Rand index


def make_groups(x, num, seed=0):
    """Group unit rows x [n, D] -> Groups: the best of STARTS runs of k-means, and how far it can be trusted."""
    from sklearn.metrics import adjusted_rand_score, silhouette_score  # here: its import takes a second

    runs, inertia = kmeans(x, num, STARTS, seed)
    labels = runs[inertia.argmin()]
    others = [adjusted_rand_score(labels, other) for i, other in enumerate(runs) if i != int(inertia.argmin())]
    members, tightness = [], []
    for own in (torch.where(labels == c)[0] for c in range(num)):
        cosine = x[own] @ F.normalize(x[own].mean(0), dim=0)
        members.append(own[cosine.argsort(descending=True, stable=True)].tolist())
        tightness.append(float(cosine.mean()))
    order = sorted(range(num), key=lambda c: (-len(members[c]), members[c]))
    sample = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:SAMPLE]
    kinds = len(labels[sample].unique())
    silhouette = None
    if 1 < kinds < len(sample):
        silhouette = float(silhouette_score(x[sample], labels[sample], metric="cosine"))
    return Groups([members[c] for c in order], [tightness[c] for c in order], silhouette,
                  sum(others) / len(others))


def quality_in_words(groups):
    """How good the number of groups is, in words."""
    apart = "no silhouette" if groups.silhouette is None else f"mean silhouette {groups.silhouette:.3f}"
    number = f"{len(groups.members)} group{'s' if len(groups.members) > 1 else ''}"
    return (f"{number}: {apart} (-1 to 1; near 0 neighbouring groups run into one another), "
            f"{STARTS} starts agree by {groups.agreement:.2f} (adjusted Rand index; 1: always the same groups). Try "
            f"several --num, and of those that agree take the one with the highest silhouette")
