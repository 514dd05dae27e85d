"""Stage 2: N prototypes, unit vectors as far apart as they go (paper section 3.3, Eq. 11).

In   how many (--num), of which dimension (--dim), a seed
Out  .npz, kind "prototypes": prototypes float32 [N, dim], rows of unit length; header: num, dim, seed, steps,
     construction, mean_cosine, max_cosine, bound, device, threads, torch

    python prototypes.py --num 1000 --dim 128 --seed 0 --out prototypes.npz

About 40 seconds of one CPU core for 1000 x 128; ends at a mean nearest-neighbour cosine of 0.0718 (the loss of Eq. 11)
and a maximum of 0.0719. No code can have a maximum below 0.0366 (`levenshtein_bound`); random directions have 0.28.
The same seed gives the same file on the same machine with the same torch and number of threads.

Departures from the paper, which runs SGD on Eq. 11:
- The row maximum passes its gradient to one neighbour at a time, so SGD crawls (50,000 steps end at 0.099). Here the
  maximum is softened to a log-sum-exp of inverse temperature beta, minimised by L-BFGS, and beta doubles from
  sqrt(dim)/2 until nothing of the softness is left.
- Known arrangements are written down: the circle (dim = 2), the simplex (N <= dim+1) and the orthoplex (N <= 2 dim),
  which nothing beats, and for dim a power of two and N <= dim^2 the Z4-Kerdock code, which is kept where the fit can't
  get below it: for 2000 x 64 it has 0.125, the fit 0.183.
"""

import argparse
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from support.cli import Help, command_line, random_seed
from support.errors import BadInput
from support.files import check_writable, load_arrays, save_arrays

STEPS = 150          # L-BFGS steps a temperature for 1000 x 128; larger problems get fewer (`default_steps`)
LAST_BETA = 2e4      # cosines that differ by 1e-4 weigh e^-2 there: softer ends gave away 1e-4, harder ones nothing
BLOCK = 2 ** 22      # cosines held at a time (16 MB)
EXPONENT = -60.0     # smaller weights count as e^-60, so that no product falls among the slow denormal numbers
# bits: coefficients of a primitive polynomial over Z2 of each degree (Watson, Math. Comp. 16, 1962)
PRIMITIVE = {1: 0b11, 2: 0b111, 3: 0b1011, 4: 0b10011, 5: 0b100101, 6: 0b1000011, 7: 0b10000011, 8: 0b100011101,
             9: 0b1000010001, 10: 0b10000001001}


# ---------------------------------------------------------------------------------------------------------------------
# Eq. 11
# ---------------------------------------------------------------------------------------------------------------------
def prototype_loss(W):
    """L_reg of Eq. 11, the mean nearest-neighbour cosine. W [N, dim], rows of unit length -> scalar, differentiable."""
    # Eq. 11: Omega = W W^T - 2I; the 2I makes the diagonal -1, so that no prototype is its own neighbour
    Omega = W @ W.T - 2 * torch.eye(len(W), dtype=W.dtype, device=W.device)  # [N, N]
    return Omega.max(dim=1).values.mean()


def blocks(W):
    """Omega of Eq. 11 in blocks of rows: yields (first row, [rows, N])."""
    rows = max(1, BLOCK // len(W))
    for i in range(0, len(W), rows):
        Omega = W[i:i + rows] @ W.T
        Omega.diagonal(i).fill_(-1)
        yield i, Omega


def nearest_cosine(prototypes):
    """Cosine of each prototype and its nearest -> (mean, maximum); the mean is Eq. 11. prototypes [N, dim], rows of
    unit length. Memory for 16 MB of cosines, whatever N."""
    nearest = torch.cat([Omega.amax(dim=1) for _, Omega in blocks(prototypes)])
    return nearest.double().mean().item(), nearest.max().item()


def soft_loss(W, beta):
    """Eq. 11 with a soft maximum, and its gradient in W. W [N, dim] -> scalar (float64), [N, dim].

    L_beta = 1/N sum_i 1/beta log sum_{j != i} exp(beta w_i.w_j), from L_reg to L_reg + log(N-1)/beta. With the weights
    S = softmax_j(beta w_i.w_j): dL_beta/dW = (S + S^T) W / N.
    """
    loss, gradient = 0.0, torch.zeros_like(W)
    for i, Omega in blocks(W):
        rows = slice(i, i + len(Omega))
        nearest = Omega.amax(dim=1, keepdim=True)
        weights = Omega.sub_(nearest).mul_(beta).clamp_(min=EXPONENT).exp_()  # [rows, N], in place of Omega
        z = weights.sum(dim=1, keepdim=True)
        loss = loss + (nearest + z.log() / beta).double().sum()
        gradient[rows] += weights @ W / z
        gradient += weights.T @ (W[rows] / z)
    return loss / len(W), gradient / len(W)


# ---------------------------------------------------------------------------------------------------------------------
# Bounds
# ---------------------------------------------------------------------------------------------------------------------
def levenshtein_bound(num, dim):
    """No `num` unit vectors of `dim` dimensions have a maximum cosine below this.

    Up to 2 dim vectors: Rankin (1955), attained by simplex and orthoplex. Beyond: Levenshtein (1979, 1992), for codes
    on the sphere (the Welch bounds are for lines). Put mass 1/N at t = 1; the bound is the largest free node of the
    quadrature on [-1, 1], with the weight (1-t^2)^((dim-3)/2), that has it (odd degree), or it and a node at -1 (even
    degree), the degree being where N falls among the sizes of Delsarte, Goethals and Seidel (1977): L_m(dim, s) = N.
    """
    if num <= dim + 1:
        return -1 / (num - 1)
    if num <= 2 * dim:
        return 0.0

    def harmonics(i):  # spherical harmonics of degree i
        return math.comb(dim + i - 1, i) - (math.comb(dim + i - 3, i - 2) if i >= 2 else 0)

    def orthogonal(k):  # to lower degrees under the weight less the mass, in Gegenbauer polynomials with P_i(1) = 1
        r = [harmonics(i) for i in range(k)]
        return np.array([*r, num - sum(r)], dtype=float)

    k = 1
    while num > 2 * math.comb(dim + k - 1, dim - 1):  # size of a tight design of degree 2k+1
        k += 1
    if num <= math.comb(dim + k - 1, dim - 1) + math.comb(dim + k - 2, dim - 1):  # of degree 2k
        c = orthogonal(k)
    else:
        c, d = orthogonal(k + 1), np.append(orthogonal(k), 0)
        signs = (-1.0) ** np.arange(k + 2)  # P_i(-1)
        c = c * (d @ signs) - d * (c @ signs)  # zero at -1
    # t P_i = ((i+dim-2) P_{i+1} + i P_{i-1}) / (2i+dim-2); the zeros of sum_i c_i P_i are the eigenvalues of
    i = np.arange(len(c) - 1)
    up = np.where(i == 0, 1.0, (i + dim - 2) / np.maximum(2 * i + dim - 2, 1))
    T = np.diag(up[:-1], 1) + np.diag((1 - up)[1:], -1)
    T[-1] -= up[-1] * c[:-1] / c[-1]
    return float(np.linalg.eigvals(T).real.max())


def simplex(num):
    """num vectors [num, num-1], every cosine -1/(num-1): the centred unit vectors e_i, in a basis of their span."""
    eye = torch.eye(num, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.cat([torch.ones_like(eye[:, :1]), eye[:, :-1]], dim=1))  # first: the ones
    return basis[:, 1:] * math.sqrt(num / (num - 1))


def orthoplex(num, dim):
    """num <= 2 dim of the vectors e_i, -e_i [num, dim]: no cosine above 0."""
    eye = torch.eye(dim, dtype=torch.float64)
    return torch.cat([eye, -eye])[:num]


def kerdock(num, dim):
    """num <= dim^2 words of the Z4-Kerdock code [num, dim], dim = 2^(m+1): no cosine above 2^-ceil(m/2).

    Hammons et al., IEEE Trans. IT 40(2), 1994: the words are u + lambda G mod 4, u in Z4, lambda in Z4^m; the columns
    of G are 0 and 2^m - 1 successive states of a recurrence over Z4. Letter c stands for i^c, the two coordinates
    (Re, Im). Words are taken orthoplex by orthoplex: 2 dim words share lambda mod 2 and have no cosine above 0.
    """
    m = dim.bit_length() - 2
    n = 2 ** m
    # the recurrence's polynomial over Z4: Graeffe's lift h(x^2) = +-(e(x)^2 - o(x)^2) of a primitive one over Z2
    over_z2 = PRIMITIVE[m] >> np.arange(m + 1) & 1
    even, odd = over_z2 * (np.arange(m + 1) % 2 == 0), over_z2 * (np.arange(m + 1) % 2 == 1)
    h = (np.convolve(even, even) - np.convolve(odd, odd))[::2]
    h = h * h[m] % 4  # monic
    state = [1] + [0] * (m - 1)
    while len(state) < n + m - 2:
        state.append(int(-(h[:m] @ state[-m:]) % 4))
    G = torch.tensor([[0, *state[i:i + n - 1]] for i in range(m)])  # [m, n]
    word = torch.arange(num)
    bit = torch.arange(m)
    mod2, twos = (word // (4 * n))[:, None] >> bit & 1, (word // 4 % n)[:, None] >> bit & 1  # lambda = mod2 + 2 twos
    letters = (word[:, None] % 4 + (mod2 + 2 * twos) @ G) % 4  # [num, n]
    re_im = torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
    return re_im[letters].flatten(1) / math.sqrt(n)  # [num, 2n]


def closed_form(num, dim, seed=0):
    """(name, prototypes float32 [num, dim]) by the formulas above, turned by a random rotation, or (None, None)."""
    if dim == 2:
        angle = torch.arange(num, dtype=torch.float64) * (2 * math.pi / num)
        name, W = "circle", torch.stack([angle.cos(), angle.sin()], dim=1)
    elif num <= dim + 1:
        name, W = "simplex", simplex(num)
    elif num <= 2 * dim:
        name, W = "orthoplex", orthoplex(num, dim)
    elif dim & (dim - 1) == 0 and dim.bit_length() - 2 in PRIMITIVE and num <= dim ** 2:
        name, W = "kerdock", kerdock(num, dim)
    else:
        return None, None
    g = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(dim, W.shape[1], dtype=torch.float64, generator=g))
    return name, (W @ rotation.T).float()


# ---------------------------------------------------------------------------------------------------------------------
# The fit
# ---------------------------------------------------------------------------------------------------------------------
def default_steps(num, dim):
    """Steps a temperature. A step costs num^2 dim; beyond 1000 x 128 the total may grow by the root of that."""
    return max(15, round(STEPS * min(1.0, math.sqrt(1000 ** 2 * 128 / (num ** 2 * dim)))))


def descend(W, beta, steps, report):
    """L-BFGS on L_beta over the sphere from W [N, dim] -> (W, L_beta). report(share of `steps` done, L_beta)."""
    V = W.clone().requires_grad_()  # W is V with rows of unit length: the constraint of Eq. 11
    evaluations = 0

    @torch.no_grad()
    def closure():
        nonlocal evaluations
        evaluations += 1
        length = V.norm(dim=1, keepdim=True)
        W = V / length
        loss, gradient = soft_loss(W, beta)
        gradient -= (gradient * W).sum(dim=1, keepdim=True) * W  # along the sphere
        V.grad = gradient / length * len(W)  # of N L_beta, whose scale doesn't depend on N
        report(min(evaluations / steps, 1.0), loss.item())
        return loss * len(W)

    torch.optim.LBFGS([V], max_iter=steps, history_size=10, line_search_fn="strong_wolfe", tolerance_grad=0,
                      tolerance_change=1e-7).step(closure)
    W = torch.nn.functional.normalize(V.detach())
    return W, soft_loss(W, beta)[0].item()


def construct(num, dim, seed=0, device="cpu", steps=None, report=None):
    """Prototypes and how they were made: -> (float32 [num, dim] on `device`, rows of unit length; name).

    num >= 2, dim >= 2. steps: L-BFGS steps a temperature (default: `default_steps`). report(share of the steps, beta,
    loss) is called at each step. Raises BadInput, naming the argument.
    """
    for name, value, least in ("num", num, 2), ("dim", dim, 2), ("steps", 1 if steps is None else steps, 1):
        if value < least:
            raise BadInput(f"--{name} is {value}, but must be at least {least}")
    name, known = closed_form(num, dim, seed)
    if name in ("circle", "simplex", "orthoplex"):
        return known.to(device), name
    to_beat = math.inf if known is None else nearest_cosine(known)[0]
    steps = steps or default_steps(num, dim)
    betas = [math.sqrt(dim) / 2 * 2 ** i for i in range(1 + int(math.log2(2 * LAST_BETA / math.sqrt(dim))))]
    W = torch.randn(num, dim, generator=torch.Generator().manual_seed(seed))
    W = torch.nn.functional.normalize(W).to(device)
    for stage, beta in enumerate(betas):
        def at(share, loss, stage=stage, beta=beta):
            if report:
                report((stage + share) / len(betas), beta, loss)

        W, loss = descend(W, beta, steps, at)
        # L_beta exceeds L_reg by log(N-1)/beta at most: its minimum less that is as low as this way can lead
        if loss - math.log(num - 1) / beta > to_beat:
            return known.to(device), name
    return (W, "fit") if nearest_cosine(W)[0] < to_beat else (known.to(device), name)


def fit(num, dim, seed=0, device="cpu", steps=None, report=None):
    """The prototypes alone: see `construct`."""
    return construct(num, dim, seed, device, steps, report)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------
class Progress:
    """A bar on a terminal; elsewhere a line a temperature. Both with an estimate, once there is something to go by."""

    WAIT = 3  # seconds; counted from the first step, which also pays for what torch prepares

    def __init__(self):
        self.start, self.first, self.beta = time.monotonic(), None, 0.0
        self.bar = tqdm(total=100, disable=None, bar_format="{desc} {percentage:3.0f}%|{bar}|")

    def __call__(self, share, beta, loss):
        now = time.monotonic()
        self.first = self.first or (now, share)
        text = f"beta {beta:.0f}, soft loss {loss:.4f}, {now - self.start:.0f} s"
        spent, done = now - self.first[0], share - self.first[1]
        if spent >= self.WAIT and done > 0:
            text += f", about {spent / done * (1 - share):.0f} s to go"
        if not self.bar.disable:
            self.bar.set_description_str(text, refresh=False)
            self.bar.update(100 * share - self.bar.n)
        elif beta != self.beta:
            print(text, flush=True)
        self.beta = beta


def held(out, settings):
    """Whether `out` holds what `settings` ask for. Raises BadInput if it holds anything else or can't be written."""
    if os.path.isfile(out):
        header, _ = load_arrays(out, "prototypes", "python prototypes.py --force")
        other = [f"--{k} {header.get(k)}" for k in settings if header.get(k) != settings[k]]
        if other:
            raise BadInput(f"{out} was made with {' '.join(other)}; give another --out, or --force to replace it")
        return True
    check_writable(out, "--out")
    return False


def main(argv=None):
    """The command -> exit status 0. Raises BadInput."""
    p = argparse.ArgumentParser(prog="prototypes.py", description="Prototypes as far apart as they go (Eq. 11).",
                                formatter_class=Help)
    p.add_argument("--num", type=int, default=1000, help="prototypes, N (default 1000, as in the paper's Fig. 3)")
    p.add_argument("--dim", type=int, default=128, help="their dimension (default 128; the paper names none)")
    p.add_argument("--seed", type=random_seed, default=0, help="of the start and of rotations (default 0)")
    p.add_argument("--out", type=Path, required=True, help="file to write, such as prototypes.npz")
    p.add_argument("--steps", type=int, help="steps a temperature (default 150, fewer beyond 1000 x 128)")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda where there is one")
    p.add_argument("--force", action="store_true", help="replace --out if it holds something else")
    s = p.parse_args(argv)
    if s.device == "cuda" and not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no CUDA device; use --device cpu")
    device = "cuda" if s.device != "cpu" and torch.cuda.is_available() else "cpu"
    settings = {"num": s.num, "dim": s.dim, "seed": s.seed, "steps": s.steps or "default"}
    if s.force:
        check_writable(s.out, "--out")
    elif held(s.out, settings):
        print(f"{s.out} is there already, with these settings")
        return 0
    start = time.monotonic()
    progress = Progress()
    W, construction = construct(s.num, s.dim, s.seed, device, s.steps, progress)
    progress.bar.close()
    mean, greatest = nearest_cosine(W)
    bound = levenshtein_bound(s.num, s.dim)
    header = {**settings, "construction": construction, "mean_cosine": mean, "max_cosine": greatest, "bound": bound,
              "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__}
    save_arrays(s.out, "prototypes", header, prototypes=W.cpu().numpy())
    print(f"{s.num} prototypes of {s.dim}-d ({construction}, {time.monotonic() - start:.0f} s): nearest-neighbour "
          f"cosine mean {mean:.4f}, maximum {greatest:.4f}; no maximum can be below {bound:.4f} (Levenshtein)\n"
          f"wrote {s.out}")
    return 0


if __name__ == "__main__":
    command_line(main)
