"""The method: online cluster assignment, guided by the other view, and the swapped loss (paper sections 3.1, 3.2, 3.4).

In   scores S = F P^T: unit features of a batch times unit prototypes; view (0 rgb, 1 flow), crop, sample, prototype
Out  assign         Eqs. 3-5    log D of one view by itself, or with a given prior (Eqs. 6-10)
     guided_assign  Eqs. 6-10   log D of both views, each with the other's assignment as its prior
     swapped_loss   Eqs. 1-2, 12-13  cross entropy of the other crops' predictions with given assignments
     guided_loss    the two above; one fused operator where the extension is built

    log_d = goca.guided_assign(scores[:, :2])          # [2, 2, M, N], rows of exp(log_d) sum to 1
    loss = goca.guided_loss(scores, n_assign=2)        # scores [2, V, M, N]; loss.backward() gives dloss/dscores

Conventions. S is a similarity and C = -S the cost. Rows are the M samples, columns the N prototypes. In U (Eq. 4)
columns sum to 1/N and rows to 1/M; what is returned is M D, so that each row is a distribution over prototypes.
Everything iterates in the log domain, in float32 whatever autocast says (float64 in, float64 throughout).

Derivation of the update (Lemma 1). Minimise over D in U, D' the prior (Eq. 6; Eq. 5 is lambda2 = 0):

    <D, C> + lambda1 sum D log D + lambda2 sum D log(D / D')

With multipliers alpha_i (rows) and beta_j (columns) the derivative by D_ij must be zero:

    C_ij + (lambda1 + lambda2)(log D_ij + 1) - lambda2 log D'_ij + alpha_i + beta_j = 0,   hence, with C = -S,

    D = diag(u) K diag(v),   K = exp((S + lambda2 log D') / (lambda1 + lambda2))                          (Eqs. 8, 10)

The prior enters with a plus: raising lambda2 moves D towards D'. u and v follow from the marginals by Sinkhorn's
iteration; constants such as the -0.5 of Eq. 10, or a factor of D', are absorbed by them.

Which views take a prior: `prior_views`, of rgb and of flow. (True, True) is the paper, Eqs. 6 and 7. At convergence the
prior is D' = diag(u') exp(S_other / lambda1) diag(v'); u and v absorb its factors, and what is left in Eq. 10 is

    K = exp((S_own + (lambda2 / lambda1) S_other) / (lambda1 + lambda2))

So both targets are mixtures of both views, and where lambda2 > lambda1 the other view outweighs the own one: whichever
is confident first, right or wrong, decides both. For a view without a prior lambda2 is 0 in its own Eq. 6, which is
Eq. 5: K = exp(S_own / lambda1) holds nothing of the other view, so the other can't spoil its target. (True, False) lets
flow lead: rgb's target is guided by flow, flow's is its own. (False, False) is the method Sep.

Departures from the paper. Below Eq. 5 it prints K = exp(lambda1 C), a slip for exp(-C / lambda1). It gives no number of
rounds and no temperature: 3 rounds, prototypes first and samples last, and tau = 0.1 are those of SwAV and of the
released code. The sums of Eqs. 1 and 13 are means. The released code subtracts lambda2 log D', which pushes D away from
the prior; `prior_sign=-1` keeps that as an ablation. No maximum is taken off the scores: one a sample would change the
weight of the samples in the first column sums, and so the result of a few rounds; log-sum-exp needs none.
"""

import math
import numbers
import warnings
from functools import partial

import torch

try:
    import _goca  # registers torch.ops.goca (csrc/)
except ImportError as error:
    _goca = None
    _MISSING = ("the compiled operator isn't built" if isinstance(error, ModuleNotFoundError)
                else f"the compiled operator doesn't load ({error})")

BUILD = "python setup.py build_ext --inplace"
_warned = set()


# ---------------------------------------------------------------------------------------------------------------------
# Assignment
# ---------------------------------------------------------------------------------------------------------------------
def _sinkhorn(log_k, iters):
    """diag(u) K diag(v) of Eq. 8 after `iters` rounds, as a logarithm, times M: each row of exp sums to 1.

    log_k [..., M, N]. Each half of a round adds log u or log v, the marginals of Eq. 4 being 1/N and 1/M.
    """
    m, n = log_k.shape[-2:]
    for _ in range(iters):
        log_k = log_k - log_k.logsumexp(-2, keepdim=True) - math.log(n)  # prototypes: columns sum to 1/N
        log_k = log_k - log_k.logsumexp(-1, keepdim=True) - math.log(m)  # samples: rows sum to 1/M
    return log_k + math.log(m)


@torch.no_grad()
def assign(scores, lambda1=0.02, *, log_prior=None, lambda2=0.03, iters=3, prior_sign=+1, impl="auto",
           check_finite=True):
    """Assign samples to prototypes (Eqs. 3-5), or with a prior (Eqs. 6-10) -> log D [..., M, N], no gradient.

    scores [..., M, N]       similarities, any leading dimensions, each an assignment of its own; bfloat16 and float16
                             are widened to float32
    lambda1 > 0              weight of the entropy (0.02, paper)
    log_prior [..., M, N]    log D' of the other view, shaped like scores; a factor over all of D' changes nothing
    lambda2 >= 0             weight of the prior (0.03, paper); 0 is the assignment without prior
    iters >= 1               Sinkhorn rounds, prototypes first
    prior_sign               +1 the paper; -1 the released code, which moves D away from the prior
    impl                     "reference" (PyTorch), "compiled" (C++ or CUDA), "auto" (compiled where built)
    check_finite             look for NaN and infinities first: one pass over the data, and a wait for the device;
                             skipped under torch.compile, torch.func and CUDA graph capture

    Raises ValueError, naming the argument and what was expected, for any wrong shape, dtype, device or value, and
    RuntimeError, naming the build command, where impl="compiled" and the extension isn't built.
    """
    _check_weights(lambda1, lambda2, iters, prior_sign)
    scores = _check_tensor("scores", scores, "[..., M, N]", check_finite, lambda1=lambda1)
    if log_prior is not None:
        log_prior = _check_like("log_prior", log_prior, scores, scores.shape, check_finite)
    if _compiled(impl, scores.device):
        return torch.ops.goca.assign(scores, log_prior, lambda1, lambda2, prior_sign, iters)
    scores = scores.detach()  # from forward-mode derivatives, which no_grad lets through
    if log_prior is None:
        return _sinkhorn(scores / lambda1, iters)  # Eq. 5
    return _sinkhorn((scores + prior_sign * lambda2 * log_prior.detach()) / (lambda1 + lambda2), iters)  # Eq. 10


@torch.no_grad()
def guided_assign(scores, lambda1=0.02, lambda2=0.03, iters=3, impl="auto", *, prior_sign=+1, prior_views=(True, True),
                  check_finite=True):
    """Each view's assignment with the other view's unguided one as its prior (Eqs. 6, 7) -> log D [2, A, M, N].

    scores [2, A, M, N]      view (rgb, flow), assigning crop, sample, prototype
    prior_views              whether rgb, and whether flow, takes the prior; a view that doesn't is assigned by itself
                             (Eq. 5). (True, True) the paper; (True, False) flow leads; (False, False) no
                             guiding, Table 1's Sep

    Other arguments and errors as in `assign`.
    """
    _check_weights(lambda1, lambda2, iters, prior_sign)
    _check_prior_views(prior_views)
    scores = _check_tensor("scores", scores, "[2, A, M, N]", check_finite, lambda1=lambda1)
    if _compiled(impl, scores.device):
        return torch.ops.goca.guided_assign(scores, lambda1, lambda2, prior_sign, iters, prior_views)
    unguided = partial(assign, lambda1=lambda1, iters=iters, impl="reference", check_finite=False)
    guided = partial(unguided, lambda2=lambda2, prior_sign=prior_sign)
    if prior_views[0] == prior_views[1]:
        log_d = unguided(scores)  # Eq. 5, of both views
        return guided(scores, log_prior=log_d.flip(0)) if prior_views[0] else log_d  # Eqs. 6, 7: of the other view
    leader = 0 if prior_views[1] else 1
    log_d = unguided(scores[leader])  # Eq. 5
    led = guided(scores[1 - leader], log_prior=log_d)  # Eq. 6, or 7 where rgb leads
    return torch.stack([led, log_d] if leader else [log_d, led])


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------
def swapped_loss(scores, log_targets, temperature=0.1, impl="auto", *, check_finite=True):
    """Cross entropy of every crop's prediction with the assignments of the other crops (Eqs. 1-2, 12-13) -> scalar.

    scores [G, V, m, N]      view, crop, sample, prototype; G = 2 in GOCA, 1 for one view or an average of both; V >= 2
    log_targets [G, A, m, N] log D of the first A crops of each view (A <= V); no gradient flows through it
    temperature > 0          tau of softmax(S / tau) (0.1, SwAV)

    The mean over samples, views and pairs of crops. `impl`, `check_finite` and errors as in `assign`. Compiled, it has
    derivatives of any order by torch.autograd; torch.func and forward mode need impl="reference".
    """
    _check_positive("temperature", temperature)
    scores = _check_tensor("scores", scores, "[G, V, m, N]", check_finite, temperature=temperature)
    _check_crops(scores)
    if not isinstance(log_targets, torch.Tensor) or log_targets.dim() != 4:
        raise ValueError(f"log_targets must be a tensor [G, A, m, N] of 4 dimensions, got {_describe(log_targets)}")
    if not 1 <= log_targets.shape[1] <= scores.shape[1]:
        raise ValueError(f"log_targets must hold 1 to V = {scores.shape[1]} assigning crops (dimension 1), "
                         f"got {log_targets.shape[1]}")
    shape = scores.shape[:1] + log_targets.shape[1:2] + scores.shape[2:]  # [G, A, m, N]
    log_targets = _check_like("log_targets", log_targets.detach(), scores, shape, check_finite)
    if _compiled(impl, scores.device):
        return torch.ops.goca.swapped_loss(scores, log_targets, temperature)[0]

    log_g = torch.log_softmax(scores / temperature, dim=-1)  # Eq. 2, right: the predictions, [G, V, m, N]
    d = log_targets.exp()  # [G, A, m, N]
    pairs = [(a, v) for a in range(d.shape[1]) for v in range(log_g.shape[1]) if v != a]
    return sum(-(d[:, a] * log_g[:, v]).sum(-1).mean() for a, v in pairs) / len(pairs)  # Eq. 2, left; Eqs. 12, 13


def guided_loss(scores, *, n_assign=2, lambda1=0.02, lambda2=0.03, temperature=0.1, iters=3, impl="auto", prior_sign=+1,
                prior_views=(True, True), batch_scores=None, first_row=0, check_finite=True):
    """`guided_assign` of the first `n_assign` crops, then `swapped_loss` of all crops (Eqs. 6-7, 12-13) -> scalar.

    scores [2, V, m, N]      view (rgb, flow), crop, sample, prototype; V >= 2, 1 <= n_assign <= V
    batch_scores [2, n_assign, M, N], first_row
                             where the batch is spread over processes: the scores of the assigning crops of the
                             whole batch, of which rows first_row .. first_row + m are this process's own. They come
                             from one all-gather of unit features. The loss is then the mean over the own samples, and
                             its gradient that of the own scores. By default the m samples are the batch.

    Other arguments and errors as in `assign`, `guided_assign` and `swapped_loss`.
    """
    _check_weights(lambda1, lambda2, iters, prior_sign)
    _check_prior_views(prior_views)
    _check_positive("temperature", temperature)
    scores = _check_tensor("scores", scores, "[2, V, m, N]", check_finite, lambda1=lambda1, temperature=temperature)
    _check_crops(scores)
    _, v, m, n = scores.shape
    if not _is_int(n_assign) or not 1 <= n_assign <= v:
        raise ValueError(f"n_assign must be an integer from 1 to the number of crops, {v}, got {n_assign!r}")
    if batch_scores is None:
        if first_row != 0:
            raise ValueError(f"first_row must be 0 where no batch_scores are given, got {first_row!r}")
        batch_scores = scores[:, :n_assign].detach()
    else:
        if not isinstance(batch_scores, torch.Tensor) or batch_scores.dim() != 4:
            raise ValueError(f"batch_scores must be a tensor [2, A, M, N], got {_describe(batch_scores)}")
        rows = batch_scores.shape[2]
        batch_scores = _check_like("batch_scores", batch_scores.detach(), scores, (2, n_assign, rows, n), check_finite,
                                   lambda1=lambda1)
        if not _is_int(first_row) or not 0 <= first_row <= rows - m:
            raise ValueError(f"first_row must be an integer from 0 to M - m = {rows} - {m}, so that the own rows lie "
                             f"in batch_scores, got {first_row!r}")
    if _compiled(impl, scores.device):
        return torch.ops.goca.guided_loss(scores, batch_scores, first_row, lambda1, lambda2, prior_sign, iters,
                                          prior_views, temperature)[0]
    log_d = guided_assign(batch_scores, lambda1, lambda2, iters, "reference", prior_sign=prior_sign,
                          prior_views=prior_views, check_finite=False)
    return swapped_loss(scores, log_d[:, :, first_row:first_row + m], temperature, "reference", check_finite=False)


# ---------------------------------------------------------------------------------------------------------------------
# Which implementation, and the checks that both share
# ---------------------------------------------------------------------------------------------------------------------
def implementation(device):
    """What `impl="auto"` is for tensors on a device: "compiled" or "reference"."""
    return "compiled" if _compiled("auto", torch.device(device)) else "reference"


def _compiled(impl, device):
    """Whether to call the compiled operator; says once where "auto" has to do without."""
    if impl not in ("auto", "reference", "compiled"):
        raise ValueError(f'impl must be "auto", "reference" or "compiled", got {impl!r}')
    if impl == "reference":
        return False
    if _goca is None:
        missing = _MISSING
    elif device.type == "cuda" and not _goca.cuda:
        missing = "the compiled operator was built without its CUDA kernels"
    elif device.type not in ("cpu", "cuda", "meta"):
        missing = f"the compiled operator has no kernels for device {device.type!r}"
    else:
        return True
    if impl == "compiled":
        raise RuntimeError(f"{missing}; build it by `{BUILD}` in the repository's root")
    if missing not in _warned and not torch.compiler.is_compiling():
        _warned.add(missing)
        warnings.warn(f"{missing}; the PyTorch reference is used. `{BUILD}` builds the operator.", stacklevel=3)
    return False


def _describe(x):
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, torch.Tensor) else f"{type(x).__name__}"


def _is_int(x):
    return isinstance(x, (numbers.Integral, torch.SymInt)) and not isinstance(x, bool)


def _check_tensor(name, x, shape, check_finite, **divisors):
    """A non-empty floating tensor of the layout `shape`, in float32 or float64, finite also when divided."""
    dims = shape.strip("[]").split(", ")
    if not isinstance(x, torch.Tensor):
        raise ValueError(f"{name} must be a tensor {shape}, got {_describe(x)}")
    if x.dim() < 2 if dims[0] == "..." else x.dim() != len(dims):
        raise ValueError(f"{name} must have shape {shape}, got {_describe(x)}")
    if dims[0] == "2" and x.shape[0] != 2:
        raise ValueError(f"{name} must have shape {shape}, two views (rgb, flow) in dimension 0, got {_describe(x)}")
    if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} must be float64, float32, bfloat16 or float16, got {_describe(x)}")
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be a dense (strided) tensor, got layout {x.layout}")
    if x.numel() == 0:
        raise ValueError(f"{name} must not be empty: at least one sample and one prototype, got {_describe(x)}")
    if x.dtype in (torch.bfloat16, torch.float16):
        x = x.float()
    if check_finite and _is_readable(x):
        low, high = torch.stack(torch.aminmax(x.detach())).tolist()  # a NaN makes both NaN
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(x)).sum())} NaN or infinite values")
        largest = max(-low, high)
        for divisor, value in divisors.items():
            # an eighth: room for the logarithm's base, and for a difference
            if largest / float(value) > torch.finfo(x.dtype).max / 8:
                raise ValueError(f"{name} must stay within {x.dtype} when divided by {divisor}, "
                                 f"got up to {largest:.3g} / {value:.3g}")
    return x


def _is_readable(x):
    """Whether the host may look at x: not so while it is traced, captured in a CUDA graph or mapped by torch.func."""
    return not (torch.compiler.is_compiling() or x.device.type == "meta" or torch._C._are_functorch_transforms_active()
                or (x.is_cuda and torch.cuda.is_current_stream_capturing()))


def _check_like(name, x, scores, shape, check_finite, **divisors):
    """As `_check_tensor`, of the given sizes, with the dtype and device of `scores`."""
    x = _check_tensor(name, x, "[..., M, N]", False)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)} to fit scores, got {_describe(x)}")
    if x.dtype != scores.dtype:
        raise ValueError(f"{name} must have the dtype of scores, {scores.dtype}, got {x.dtype}")
    if x.device != scores.device:
        raise ValueError(f"{name} must be on the device of scores, {scores.device}, got {x.device}")
    return _check_tensor(name, x, "[..., M, N]", check_finite, **divisors)


def _check_crops(scores):
    if scores.shape[1] < 2:
        raise ValueError(f"scores must hold at least 2 crops (dimension 1): a crop is compared with the others, "
                         f"got {_describe(scores)}")


def _check_positive(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def _check_weights(lambda1, lambda2, iters, prior_sign):
    _check_positive("lambda1", lambda1)
    if isinstance(lambda2, bool) or not isinstance(lambda2, numbers.Real) or not 0 <= lambda2 < math.inf:
        raise ValueError(f"lambda2 must be a number of 0 or more (0: no guiding), got {lambda2!r}")
    if not _is_int(iters) or iters < 1:
        raise ValueError(f"iters must be an integer of at least 1, got {iters!r}")
    if prior_sign not in (+1, -1):
        raise ValueError(f"prior_sign must be +1 (towards the prior, the paper) or -1 (away), got {prior_sign!r}")


def _check_prior_views(prior_views):
    if not isinstance(prior_views, (tuple, list)) or len(prior_views) != 2 \
            or not all(isinstance(x, bool) for x in prior_views):
        raise ValueError(f"prior_views must be two booleans, whether rgb and whether flow takes a prior, "
                         f"got {prior_views!r}")
