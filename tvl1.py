"""TV-L1 optical flow (Zach, Pock, Bischof: A Duality Based Approach for Realtime TV-L1 Optical Flow, DAGM 2007).

    flow(frames [B, T, H, W]) -> [B, T-1, 2, H, W]

u minimises  sum |grad u| + lambda |rho(u)|,  rho(u) = I1(x + u0) + <grad I1(x + u0), u - u0> - I0,  over a pyramid,
coarse to fine, u0 being the flow of the last warp. With an auxiliary v close to u (weight 1 / 2 theta) it falls in two
problems, solved in turns with a step on the dual p of the total variation:

    v = u + TH(u)                     pointwise: -rho / |grad I1|^2 times grad I1, clamped to lambda theta
    u = v + theta div p
    p = (p + tau/theta grad u) / (1 + tau/theta |grad u|)

The paper leaves the discrete choices open. Here they are those of OpenCV's cv2.optflow.DualTVL1OpticalFlow, so that
stores of either agree: pyramid by bilinear resizing, bicubic warps (A = -3/4) that see 0 outside, central differences
with repeated borders, a 5x5 median of u before each 30 inner steps, and an end of a warp's steps when the mean squared
change of u is at most epsilon^2. Its gamma (illumination) is left out: 0 by default there. OpenCV 4 rounds the warp's
coordinates to 1/32 px; OpenCV 5 and this do not.

`reference` is PyTorch. The compiled operator (csrc/tvl1*) computes the same with every operation rounded as OpenCV 5
does, ten times as fast as that.
"""

import numbers

import torch
import torch.nn.functional as F

import goca

DEFAULTS = dict(tau=0.25, lam=0.15, theta=0.3, scales=5, warps=5, epsilon=0.01, inner=30, outer=10, scale_step=0.8,
                median=5)  # OpenCV's; lam is lambda, tau the dual step, median 1 means none


def flow(frames, *, impl="auto", **params):
    """Flow of consecutive frames: (u, v) in px to the right and down, from each frame to its successor.

    frames  [B, T, H, W], T >= 2: uint8, or float32 in 0..1
    params  entries of DEFAULTS to change
    impl    "reference", "compiled" (C++ or CUDA, by the device), or "auto": compiled where built
    Returns float32 [B, T-1, 2, H, W]. A pair's flow doesn't depend on what else is in the batch.
    Raises ValueError, naming the argument, where something doesn't fit; torch.OutOfMemoryError where a GPU's memory
    doesn't suffice for 256 pairs at once: hand over fewer.
    """
    if not isinstance(frames, torch.Tensor) or frames.dim() != 4 or frames.dtype not in (torch.uint8, torch.float32):
        got = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, torch.Tensor) else type(frames).__name__
        raise ValueError(f"frames must be a tensor [B, T, H, W] of uint8 or float32, got {got}")
    if frames.shape[1] < 2 or frames.numel() == 0:
        raise ValueError(f"frames must hold at least one pair of pixels that can move, got {list(frames.shape)}")
    if frames.is_floating_point() and not frames.isfinite().all():
        raise ValueError("frames must be finite")
    if unknown := params.keys() - DEFAULTS.keys():
        raise ValueError(f"TV-L1 has no parameter {', '.join(sorted(unknown))}; it has {', '.join(DEFAULTS)}")
    params = {**DEFAULTS, **params}
    for name, value in params.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise ValueError(f"{name} must be a number, got {value!r}")
    for name in ("tau", "lam", "theta"):
        if not 0 < params[name] < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {params[name]}")
    for name in ("scales", "warps", "inner", "outer"):
        if params[name] < 1 or params[name] % 1:  # NaN and infinity have no remainder 0
            raise ValueError(f"{name} must be a whole number of at least 1, got {params[name]}")
    if not 0 <= params["epsilon"] < float("inf"):
        raise ValueError(f"epsilon must be a number of 0 or more, got {params['epsilon']}")
    if not 0 < params["scale_step"] < 1:
        raise ValueError(f"scale_step must lie between 0 and 1, got {params['scale_step']}")
    if params["median"] not in (1, 5):
        raise ValueError(f"median must be 5, or 1 for none, got {params['median']}")
    params = {name: type(default)(params[name]) for name, default in DEFAULTS.items()}  # numpy's scalars too
    if impl not in ("auto", "reference", "compiled"):
        raise ValueError(f"impl must be auto, reference or compiled, got {impl!r}")
    if impl == "compiled" or (impl == "auto" and goca._goca is not None):
        if goca._goca is None:
            raise ValueError(f"impl is compiled, but the extension isn't built; build it: {goca.BUILD}")
        return torch.ops.goca.tvl1_flow(frames, *params.values())
    return reference(frames, **params)


# ---------------------------------------------------------------------------------------------------------------------
# The reference
# ---------------------------------------------------------------------------------------------------------------------
def resize(x, size, scale):
    """Bilinear: x [..., h, w] -> [..., *size]; sample d of an axis lies at (d + 1/2) scale - 1/2, borders repeated."""
    for axis, n, step in zip((-2, -1), size, scale, strict=True):
        at = (torch.arange(n, dtype=torch.float64, device=x.device) + 0.5) * step - 0.5
        at = at.clamp(0, x.shape[axis] - 1)
        i = at.floor().long()
        weight = (at - i).to(x.dtype).reshape(-1, *[1] * (-1 - axis))
        x = x.index_select(axis, i) * (1 - weight) + x.index_select(axis, (i + 1).clamp(max=x.shape[axis] - 1)) * weight
    return x


def pyramid(image, scales, step):
    """image [P, h, w] -> a list, fine to coarse; it ends before a side falls below 16 px."""
    levels = [image]
    while len(levels) < scales:
        size = [round(n * step) for n in levels[-1].shape[-2:]]
        if min(size) < 16:
            break
        levels.append(resize(levels[-1], size, (1 / step, 1 / step)))
    return levels


def central(image):
    """Central differences of image [P, h, w], borders repeated -> d/dx, d/dy."""
    x = F.pad(image[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    return (x[:, 1:-1, 2:] - x[:, 1:-1, :-2]) / 2, (x[:, 2:, 1:-1] - x[:, :-2, 1:-1]) / 2


def warp(images, u):
    """images [P, C, h, w] at x + u, u [P, 2, h, w]: bicubic, 0 outside."""
    h, w = u.shape[-2:]
    y, x = torch.meshgrid(*(torch.arange(n, dtype=u.dtype, device=u.device) for n in (h, w)), indexing="ij")
    at = torch.stack([(2 * (x + u[:, 0]) + 1) / w - 1, (2 * (y + u[:, 1]) + 1) / h - 1], -1)  # grid_sample's units
    return F.grid_sample(images, at, mode="bicubic", padding_mode="zeros", align_corners=False)


def median5(u):
    """5x5 median of u [P, 2, h, w], borders repeated."""
    patches = F.pad(u, (2, 2, 2, 2), mode="replicate").unfold(-2, 5, 1).unfold(-2, 5, 1)  # [P, 2, h, w, 5, 5]
    return patches.flatten(-2).median(-1).values


def gradient(u):
    """Forward differences of u [P, 2, h, w], 0 at the far border -> [P, 2, 2, h, w]: of u and v, by x and y."""
    return torch.stack([F.pad(u.diff(dim=-1), (0, 1)), F.pad(u.diff(dim=-2), (0, 0, 0, 1))], dim=2)


def divergence(p):
    """The negative adjoint of `gradient`: p [P, 2, 2, h, w] -> [P, 2, h, w]."""
    return F.pad(p[:, :, 0], (1, 0)).diff(dim=-1) + F.pad(p[:, :, 1], (0, 0, 1, 0)).diff(dim=-2)


def reference(frames, tau, lam, theta, scales, warps, epsilon, inner, outer, scale_step, median):
    """`flow` step by step. All pairs go together; those that reached epsilon wait for the others."""
    frames = frames.float() if frames.dtype == torch.uint8 else frames * 255
    levels = [pyramid(x.flatten(0, 1), scales, scale_step) for x in (frames[:, :-1], frames[:, 1:])]
    u = None
    for I0, I1 in reversed(list(zip(*levels, strict=True))):  # [P, h, w], coarse to fine
        size = I0.shape[-2:]
        if u is None:
            u = I0.new_zeros(len(I0), 2, *size)
        else:
            u = resize(u, size, [a / b for a, b in zip(u.shape[-2:], size, strict=True)]) / scale_step
        p = u.new_zeros(len(u), 2, 2, *size)
        images = torch.stack([I1, *central(I1)], dim=1)
        for _ in range(warps):
            warped = warp(images, u)
            Iw, g = warped[:, 0], warped[:, 1:]  # g: grad I1(x + u0), [P, 2, h, w]
            g2 = (g * g).sum(1).clamp(min=1e-30)  # where it is 0 the move below is 0 whatever the quotient
            rho0 = Iw - (g * u).sum(1) - I0
            going = torch.ones(len(u), dtype=torch.bool, device=u.device)
            for step in range(inner * outer):
                if not going.any():
                    break
                now = going[:, None, None, None]
                if step % inner == 0 and median == 5:
                    u = torch.where(now, median5(u), u)
                rho = rho0 + (g * u).sum(1)
                v = u + (-rho / g2).clamp(-lam * theta, lam * theta)[:, None] * g
                new = v + theta * divergence(p)
                error = (new - u).square().sum((1, 2, 3))
                d = tau / theta * gradient(new)
                p = torch.where(now[:, None], (p + d) / (1 + d.norm(dim=2, keepdim=True)), p)
                u = torch.where(now, new, u)
                going = going & (error > epsilon**2 * size.numel())
    return u.reshape(frames.shape[0], -1, *u.shape[1:])
