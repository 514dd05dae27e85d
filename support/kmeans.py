"""k-means (section 4.3): all restarts as one batch.

Lloyd's step asks for <c, x_i> of each centre c and point x_i. A centre is the mean of its points, so with the points'
inner products G = X X^T at hand <c, x_i> is a sum of rows of G, and a point that changes its cluster changes two of
those sums by one row. Only the first steps move many points; a matrix product does all of them again every time.
"""

import math

import torch

BLOCK = 2**25  # entries that k-means holds at a time
GRAM = 2**14  # up to so many points k-means keeps all their inner products, 1 GiB in float32


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


class ClusterSums:
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
        singleton = torch.bincount(labels[r], minlength=counts.shape[1])[labels[r]] == 1
        i = own[r].masked_fill(singleton, -torch.inf).argmax()
        labels[r, i] = c
        own[r, i] = -torch.inf


def lloyd(x, base, squares, k, labels, max_iter):
    """Lloyd's steps until no point moves: labels [R, n] -> [R, n]."""
    final, going = labels.clone(), torch.arange(len(labels), device=labels.device)
    clusters = ClusterSums(base, labels, k)
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
