"""What the features are worth, as tensor operations: nearest neighbours, k-means, and the numbers made of them.

Retrieval (section 4.2): `nearest`, `recall`. Clusters (section 4.3): `kmeans`, `cluster_scores`. Classification
(section 4.4): `accuracy`. Everything is exact: no index, no sampling. evaluate.py holds the commands.
"""

import math

import torch
from scipy.optimize import linear_sum_assignment

KS = (1, 5, 10, 20, 50)
TILE = 1024, 4096  # queries and gallery rows whose similarities are held at a time: 16 MiB in float32
BLOCK = 2**25  # entries that k-means holds at a time
GRAM = 2**14  # up to so many points k-means keeps all their inner products, 1 GiB in float32


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval
# ---------------------------------------------------------------------------------------------------------------------
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


# ---------------------------------------------------------------------------------------------------------------------
# k-means: all restarts as one batch
# ---------------------------------------------------------------------------------------------------------------------
# Lloyd's step asks for <c, x_i> of each centre c and point x_i. A centre is the mean of its points, so with the points'
# inner products G = X X^T at hand <c, x_i> is a sum of rows of G, and a point that changes its cluster changes two of
# those sums by one row. Only the first steps move many points; a matrix product does all of them again every time.
def plus_plus(inner, squares, k, uniform):
    """Greedy k-means++ (as scikit-learn's: the best of 2 + ln k draws) of all runs at once -> points int64 [R, k].

    inner(i): inner products of points i with all, [len(i), n]. squares [n]. uniform: float64 [R, k, trials] in 0..1.
    """
    runs, _, trials = uniform.shape
    n = len(squares)
    chosen = [(uniform[:, 0, 0] * n).long().clamp(max=n - 1)]  # [R]
    closest = (squares + squares[chosen[0]][:, None] - 2 * inner(chosen[0])).clamp_(min=0)  # [R, n] squared distances
    for j in range(1, k):
        mass = closest.double().cumsum(1)
        draws = torch.searchsorted(mass, uniform[:, j] * mass[:, -1:]).clamp(max=n - 1)  # [R, trials]
        to_draws = inner(draws.flatten()).view(runs, trials, n).mul(-2).add_(squares)
        to_draws.add_(squares[draws][..., None]).clamp_(min=0)
        to_draws = torch.minimum(to_draws, closest[:, None], out=to_draws)
        best = to_draws.sum(2).argmin(1)  # [R]
        row = torch.arange(runs, device=best.device)
        chosen.append(draws[row, best])
        closest = to_draws[row, best]
    return torch.stack(chosen, dim=1)


class Sums:
    """Of every run's clusters: the sum of its points' rows of `base`, and their number. sums [R, k, B], counts [R, k].

    On the CPU only the rows of points that moved are added and taken away; on a GPU, where adding rows by index is not
    deterministic, a product with the one-hot labels does it afresh.
    """

    def __init__(self, base, labels, k, afresh=None):
        self.base, self.k, self.afresh = base, k, base.is_cuda if afresh is None else afresh
        runs = len(labels)
        self.sums = base.new_zeros(runs, k, base.shape[1])
        self.update(None, labels)

    def update(self, old, new):
        """Labels `old` [R, n] (None at the start) become `new`."""
        n = new.shape[1]
        if self.afresh:
            for r, labels in enumerate(new):
                self.sums[r] = torch.nn.functional.one_hot(labels, self.k).to(self.base.dtype).T @ self.base
        else:
            run, point = torch.ones_like(new).nonzero(as_tuple=True) if old is None else (old != new).nonzero(
                as_tuple=True)
            flat = self.sums.view(-1, self.base.shape[1])
            step = max(1, 2**22 // self.base.shape[1])  # rows that fit the cache
            for run_, point_ in zip(run.split(step), point.split(step), strict=True):
                rows = self.base.index_select(0, point_)
                flat.index_add_(0, run_ * self.k + new[run_, point_], rows)
                if old is not None:
                    flat.index_add_(0, run_ * self.k + old[run_, point_], rows, alpha=-1)
        at = new + self.k * torch.arange(len(new), device=new.device)[:, None]
        self.counts = torch.bincount(at.flatten(), minlength=len(new) * self.k).view(-1, self.k)
        assert self.counts.sum() == len(new) * n

    def keep(self, runs):
        self.sums, self.counts = self.sums.index_select(0, runs), self.counts[runs]


def fill_empty(counts, labels, own):
    """Give each empty cluster the point farthest from its centre, as scikit-learn does. Changes labels [R, n]."""
    for r, c in (counts == 0).nonzero().tolist():
        lonely = torch.bincount(labels[r], minlength=counts.shape[1])[labels[r]] == 1
        i = own[r].masked_fill(lonely, -torch.inf).argmax()
        labels[r, i] = c
        own[r, i] = -torch.inf


def lloyd(x, base, squares, k, labels, max_iter):
    """Lloyd's steps until no point moves: labels [R, n] -> [R, n]."""
    final, going = labels.clone(), torch.arange(len(labels), device=labels.device)
    clusters = Sums(base, labels, k)
    distances = x.new_empty(len(labels), k, len(x))  # written again in each step: fresh memory costs more than the sums
    for _ in range(max_iter):
        products = clusters.sums if base is not x else clusters.sums @ x.T  # [R, k, n], times the count
        counts = clusters.counts.to(x.dtype)
        mean = counts.clamp(min=1).reciprocal()
        own = products.gather(1, labels[:, None])[:, 0]  # [R, n]
        c2 = torch.zeros_like(counts).scatter_add_(1, labels, own) * mean**2  # |c|^2 = mean over its points of <c, x>
        c2.masked_fill_(counts == 0, torch.inf)
        best, new = torch.addcmul(c2[..., None], products, mean[..., None], value=-2,
                                  out=distances[:len(labels)]).min(1)  # [R, n]
        own = c2.gather(1, labels) - 2 * own * mean.gather(1, labels)
        new = torch.where(best < own - 1e-6, new, labels)  # rounding alone moves nothing
        if not counts.all():
            fill_empty(counts, new, own + squares)
        moving = (new != labels).any(1)
        clusters.update(labels, new)
        final[going] = labels = new
        if not moving.any():
            break
        if moving.sum() < 0.8 * len(moving):  # the others are done; leaving them out is a copy
            moving = moving.nonzero()[:, 0]
            going, labels = going[moving], labels[moving]
            clusters.keep(moving)
    return final


def kmeans(x, k, runs, seed=0, max_iter=300):
    """k-means of float32 points x [n, D] from `runs` starts -> labels int64 [runs, n], inertia float64 [runs].

    Inertia: summed squared distance to the own centre. Raises ValueError where there are fewer points than clusters.
    """
    n = len(x)
    if not 1 <= k <= n:
        raise ValueError(f"{n} points can't make {k} clusters")
    base = x @ x.T if n <= GRAM else x
    inner = (lambda i: base.index_select(0, i)) if base is not x else (lambda i: x[i] @ x.T)
    squares = x.square().sum(1)
    trials = 2 + int(math.log(k))
    uniform = torch.rand(runs, k, trials, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    out = []
    for u in uniform.to(x.device).split(max(1, 4 * BLOCK // (k * n))):
        centres = plus_plus(inner, squares, k, u)  # [R, k]
        products = inner(centres.flatten()).view(len(u), k, n)
        labels = (squares[centres][..., None] - 2 * products).argmin(1)
        out.append(lloyd(x, base, squares, k, labels, max_iter))
    labels = torch.cat(out)
    x = x.double()
    within = [x.new_zeros(k, x.shape[1]).index_add_(0, r, x).square().sum(1) @ torch.bincount(r, minlength=k).double()
              .clamp(min=1).reciprocal() for r in labels]
    return labels, x.square().sum() - torch.stack(within)


# ---------------------------------------------------------------------------------------------------------------------
# Clusters against classes
# ---------------------------------------------------------------------------------------------------------------------
def cluster_scores(labels, truth, k):
    """Acc, NMI and F1 (section 4.3) in percent of clusterings [R, n] against classes [n] -> {name: float64 [R]}.

    Each cluster takes the class of most of its members. Acc: share of right members; "Acc one-to-one": where each class
    may name one cluster only (Hungarian). NMI: over the arithmetic mean of both entropies. F1: mean over classes;
    "F1 weighted": by their members.
    """
    labels, truth = labels.cpu(), truth.cpu()
    runs, n, classes = len(labels), len(truth), int(truth.max()) + 1
    cell = (torch.arange(runs)[:, None] * k + labels) * classes + truth
    table = torch.bincount(cell.flatten(), minlength=runs * k * classes).view(runs, k, classes)
    best = table.argmax(2)  # [R, k]: the class of a cluster; the first of equals

    def entropy(p, dims):
        return -torch.special.xlogy(p, p).sum(dims)

    p = table.double() / n
    h_clusters, h_classes, h = entropy(p.sum(2), 1), entropy(p.sum(1), 1), entropy(p, (1, 2))
    both = (h_clusters + h_classes) / 2
    nmi = torch.where(both > 0, (h_clusters + h_classes - h) / both.clamp(min=1e-300), 1.0)

    predicted = torch.zeros(runs, classes, classes, dtype=torch.int64).scatter_add_(
        1, best[..., None].expand_as(table), table)  # [R, predicted class, class]
    hit = predicted.diagonal(dim1=1, dim2=2).double()
    members = predicted.sum(1)  # of each class
    total = predicted.sum(2) + members
    f1 = 2 * hit / total.clamp(min=1)
    one_to_one = [t[linear_sum_assignment(t, maximize=True)].sum() for t in table.numpy()]
    return {"Acc": 100 * hit.sum(1) / n, "NMI": 100 * nmi, "F1": 100 * f1.sum(1) / (total > 0).sum(1),
            "Acc one-to-one": 100 * torch.tensor(one_to_one, dtype=torch.float64) / n,
            "F1 weighted": 100 * (f1 * members).sum(1) / n}
