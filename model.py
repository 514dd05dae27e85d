"""The networks: S3D and R(2+1)D-18, the projection head, the fixed prototypes (paper Fig. 2, section 4).

In   clips of both views, RGB [B, 3, T, S, S] and flow [B, 2, T, S, S].
Out  backbone features [B, 1024] (S3D) or [B, 512] (R(2+1)D-18), global average of the last block; through the head,
     unit features [B, d], whose products with the prototypes P [N, d] are the scores S = F P^T that goca.py assigns.

S3D: Xie et al., ECCV 2018, Fig. 6, without gating (7.91 M parameters before its classifier). R(2+1)D-18: Tran et al.,
CVPR 2018, table 1, with their count of middle channels (31.5 M with a 400-way classifier). `width` scales every layer's
channels (at least 8, in eights); 1.0 is the published network. Where the paper is silent: feature = global average (as
CoCLR and ViCC; R(2+1)D-18 `pool="1x2x2"` is the released 2048-d feature), head = 3 linear layers 2048-2048-d with batch
norm (released), batch norm of the shared head sees one view at a time.
"""

from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

VIEWS = ("rgb", "flow")
CHANNELS = {"rgb": 3, "flow": 2}
# Method -> how the views meet in the network. Sep differs from GOCA at the assignment only (section 4.1).
# ViCC (Toering et al., WACV 2022) differs at the loss: each view predicts the other's assignments.
METHODS = {"goca": "shared", "sep": "shared", "vicc": "shared", "sview": "separate", "avg": "average"}


def scaled(channels, width):
    """Channels of a layer at a width multiplier: multiples of 8, at least 8; width 1 leaves the published number."""
    return channels if width == 1 else max(8, round(channels * width / 8) * 8)


# On a CPU, oneDNN's 2-D kernels are faster than its 3-D ones, and torch has slow fall-backs in three dimensions only
# (1 x 1 kernels of less than 16 clips in one thread; gradients of pooling, which come in another order of memory).
# Channels last in memory, frames fold into the batch, and rows into columns, without moving a byte.
def folds(x):
    """Whether the two folds below are views."""
    return x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last_3d)


def in_space(f, x):
    """f on each frame: [B, C, T, H, W] -> f([B T, C, H, W]) -> [B, C', T, H', W']."""
    return f(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def in_time(f, x):
    """f along time, each pixel a column: [B, C, T, H, W] -> f([B, C, T, H W]) -> [B, C', T', H, W]."""
    return f(x.flatten(3)).unflatten(3, x.shape[3:])


class Conv3d(nn.Conv3d):
    """nn.Conv3d without bias, whose kernels in space or in time alone are 2-D convolutions on a CPU."""

    def __init__(self, cin, cout, kernel, stride, padding):
        super().__init__(cin, cout, kernel, stride, padding, bias=False)

    def forward(self, x):
        (kt, kh, kw), (st, sh, sw), (pt, ph, pw), w = self.kernel_size, self.stride, self.padding, self.weight
        if folds(x) and kt == st == 1:
            return in_space(lambda y: F.conv2d(y, w.squeeze(2), None, (sh, sw), (ph, pw)), x)
        if folds(x) and kh == kw == sh == sw == 1:
            return in_time(lambda y: F.conv2d(y, w.squeeze(4), None, (st, 1), (pt, 0)), x)
        return super().forward(x)


class MaxPool3d(nn.Module):
    """nn.MaxPool3d; on a CPU first in space, then in time. Ties fall to the same element."""

    def __init__(self, kernel, stride, padding):
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding

    def forward(self, x):
        (kt, *k), (st, *s), (pt, *p) = self.kernel, self.stride, self.padding
        if not folds(x):
            return F.max_pool3d(x, self.kernel, self.stride, self.padding)
        x = in_space(lambda y: F.max_pool2d(y, k, s, p), x)
        return x if kt == st == 1 else in_time(lambda y: F.max_pool2d(y, (kt, 1), (st, 1), (pt, 0)), x)


def precision(device):
    """What networks compute in: bfloat16 on a GPU, float32 on a CPU, where bfloat16 has errors (torch 2.13: Conv3d of
    kernel (3, 1, 1) on 2 frames, which S3D's last blocks see). Assignment and loss are float32 anyway."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class ConvBNReLU(nn.Sequential):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, cin, cout, kernel, stride=(1, 1, 1), padding=(0, 0, 0), relu=True):
        layers = [Conv3d(cin, cout, kernel, stride, padding), nn.BatchNorm3d(cout)]
        super().__init__(*layers, *([nn.ReLU(inplace=True)] if relu else []))


# ---------------------------------------------------------------------------------------------------------------------
# S3D: Inception-v1 inflated, each k x k x k convolution split into 1 x k x k in space and k x 1 x 1 in time
# ---------------------------------------------------------------------------------------------------------------------
class SeparableConv(nn.Sequential):
    """1 x k x k, then k x 1 x 1, each with batch norm and ReLU."""

    def __init__(self, cin, cout, k, stride=1):
        p = k // 2
        super().__init__(ConvBNReLU(cin, cout, (1, k, k), (1, stride, stride), (0, p, p)),
                         ConvBNReLU(cout, cout, (k, 1, 1), (stride, 1, 1), (p, 0, 0)))


class Inception(nn.Module):
    """Four branches joined along channels: 1x1 | 1x1, 3x3x3 | 1x1, 3x3x3 | 3x3x3 max pool, 1x1."""

    def __init__(self, cin, b0, b1a, b1b, b2a, b2b, b3):
        super().__init__()
        self.branch0 = ConvBNReLU(cin, b0, 1)
        self.branch1 = nn.Sequential(ConvBNReLU(cin, b1a, 1), SeparableConv(b1a, b1b, 3))
        self.branch2 = nn.Sequential(ConvBNReLU(cin, b2a, 1), SeparableConv(b2a, b2b, 3))
        self.branch3 = nn.Sequential(MaxPool3d((3, 3, 3), (1, 1, 1), (1, 1, 1)), ConvBNReLU(cin, b3, 1))
        self.channels = b0 + b1b + b2b + b3

    def forward(self, x):
        return torch.cat([self.branch0(x), self.branch1(x), self.branch2(x), self.branch3(x)], dim=1)


class S3D(nn.Module):
    """S3D without its classifier: [B, C, T, H, W] -> feature map [B, 1024 width, T/8, H/32, W/32].

    T >= 8 frames and H, W >= 32 pixels.
    """

    BLOCKS = (  # b0, b1a, b1b, b2a, b2b, b3 of each Inception block; None: a max pool of that kernel and stride 2
        (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64),  # 3b, 3c
        ("pool", 3),
        (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),  # 4b, 4c, 4d
        (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128),  # 4e, 4f
        ("pool", 2),
        (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128))  # 5b, 5c
    min_frames, min_size = 8, 32

    def __init__(self, in_channels=3, width=1.0):
        super().__init__()
        c64, c192 = scaled(64, width), scaled(192, width)
        layers = [SeparableConv(in_channels, c64, 7, stride=2), MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
                  ConvBNReLU(c64, c64, 1), SeparableConv(c64, c192, 3),
                  MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))]
        c = c192
        for block in self.BLOCKS:
            if block[0] == "pool":
                k = block[1]
                layers.append(MaxPool3d((k, k, k), (2, 2, 2), (1 if k == 3 else 0,) * 3))
            else:
                layers.append(Inception(c, *(scaled(b, width) for b in block)))
                c = layers[-1].channels
        self.layers = nn.Sequential(*layers)
        self.out_channels = c

    def forward(self, x):
        return self.layers(x)


# ---------------------------------------------------------------------------------------------------------------------
# R(2+1)D-18: ResNet-18 with each 3 x 3 x 3 convolution split, through M middle channels
# ---------------------------------------------------------------------------------------------------------------------
class ResidualBlock(nn.Module):
    """ReLU(x + two (2+1)D convolutions of x), the shortcut projected where the shape changes.

    A (2+1)D convolution is 1 x 3 x 3 to m channels, batch norm, ReLU, 3 x 1 x 1, where m keeps the parameters of the
    3 x 3 x 3 convolution that it replaces; both of a block have the m of its first.
    """

    def __init__(self, cin, cout, stride):
        super().__init__()
        m = (cin * cout * 27) // (cin * 9 + 3 * cout)
        self.conv1 = nn.Sequential(ConvBNReLU(cin, m, (1, 3, 3), (1, stride, stride), (0, 1, 1)),
                                   ConvBNReLU(m, cout, (3, 1, 1), (stride, 1, 1), (1, 0, 0)))
        self.conv2 = nn.Sequential(ConvBNReLU(cout, m, (1, 3, 3), padding=(0, 1, 1)),
                                   ConvBNReLU(m, cout, (3, 1, 1), padding=(1, 0, 0), relu=False))
        self.shortcut = nn.Identity()
        if stride != 1 or cin != cout:
            self.shortcut = ConvBNReLU(cin, cout, 1, (stride, stride, stride), relu=False)

    def forward(self, x):
        return F.relu(self.conv2(self.conv1(x)) + self.shortcut(x))


class R2Plus1D18(nn.Module):
    """R(2+1)D-18 without its classifier: [B, C, T, H, W] -> feature map [B, 512 width, T/8, H/16, W/16]."""

    min_frames, min_size = 1, 1

    def __init__(self, in_channels=3, width=1.0):
        super().__init__()
        c, stem = scaled(64, width), scaled(45, width)
        layers = [ConvBNReLU(in_channels, stem, (1, 7, 7), (1, 2, 2), (0, 3, 3)),
                  ConvBNReLU(stem, c, (3, 1, 1), padding=(1, 0, 0))]
        for i, channels in enumerate((64, 128, 256, 512)):
            cout = scaled(channels, width)
            layers += [ResidualBlock(c, cout, 1 if i == 0 else 2), ResidualBlock(cout, cout, 1)]
            c = cout
        self.layers = nn.Sequential(*layers)
        self.out_channels = c

    def forward(self, x):
        return self.layers(x)


ARCHITECTURES = {"s3d": S3D, "r2plus1d18": R2Plus1D18}


def too_small(arch, frames, size):
    """A message where clips of `frames` frames and `size` px are smaller than the strides of `arch` allow, or None."""
    net = ARCHITECTURES[arch]
    if frames >= net.min_frames and size >= net.min_size:
        return None
    return (f"clips of {frames} frames and {size} px are too small for {arch}, which needs {net.min_frames} frames and "
            f"{net.min_size} px")


# ---------------------------------------------------------------------------------------------------------------------
# Backbone + pooling, head, prototypes
# ---------------------------------------------------------------------------------------------------------------------
class BatchNormStatistics:
    """The running statistics of all batch norms of a layer, read and written in a few launches."""

    def __init__(self, layer):
        norms = [m for m in layer.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        # data: autograd, which holds them for the backward pass, need not know that they are written
        buffers = [b.data for m in norms for b in m.buffers(recurse=False)]
        self.buffers = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype: 0 for b in buffers}]

    def read(self):
        """-> all values, one vector a dtype."""
        return [torch.cat([b.flatten() for b in group]) for group in self.buffers]

    def write(self, values):
        """Set them to what `read` gave."""
        for group, flat in zip(self.buffers, values, strict=True):
            parts = flat.split([b.numel() for b in group])
            torch._foreach_copy_(group, [part.view_as(b) for part, b in zip(parts, group, strict=True)])

    def undo_unless(self, before, stepped):
        """After a step: back to `before`, unless it was done (`stepped`, a bool tensor) -> what they are now."""
        now = [torch.where(stepped, new, old) for new, old in zip(self.read(), before, strict=True)]
        self.write(now)
        return now


@contextmanager
def statistics_kept(layer):
    """Let the batch norms of a layer leave their running statistics as they are."""
    statistics = BatchNormStatistics(layer)
    before = statistics.read()
    try:
        yield
    finally:
        statistics.write(before)


class Backbone(nn.Module):
    """A network and its pooling: clips [B, C, T, S, S] -> features [B, feature_dim], float32.

    pool: "avg" (global average) or "1x2x2" (time averaged, 2 x 2 in space: 2048-d for R(2+1)D-18, released code).
    recompute: an attribute; True keeps no activations inside the layers but computes them again in the backward pass,
        for less memory and a third more time.
    Raises ValueError for clips smaller than the network's strides allow.
    """

    def __init__(self, arch, in_channels, width=1.0, pool="avg"):
        super().__init__()
        self.arch, self.net = arch, ARCHITECTURES[arch](in_channels, width)
        self.pool = {"avg": 1, "1x2x2": 2}[pool]
        self.feature_dim = self.net.out_channels * self.pool ** 2
        self.recompute = False
        for m in self.modules():
            if isinstance(m, nn.Conv3d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x):
        if why := too_small(self.arch, x.shape[2], min(x.shape[3:])):
            raise ValueError(why)
        if self.recompute and self.training:
            for layer in self.net.layers:
                x = checkpoint(layer, x, use_reentrant=False,
                               context_fn=lambda layer=layer: (nullcontext(), statistics_kept(layer)))
        else:
            x = self.net(x)
        return F.adaptive_avg_pool3d(x, (1, self.pool, self.pool)).flatten(1).float()


class Head(nn.Sequential):
    """Projection head: 3 linear layers with batch norm and ReLU between, [B, feature_dim] -> [B, d]."""

    def __init__(self, feature_dim, hidden, dim):
        super().__init__(nn.Linear(feature_dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
                         nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True),
                         nn.Linear(hidden, dim))


class TwoView(nn.Module):
    """Two backbones, a projection head and the fixed prototypes (Fig. 2); of one of `views` one backbone (SwAV).

    prototypes: [N, d] unit rows, a buffer: saved with the weights, never trained (section 3.3), unless
        `train_prototypes` (SwAV's way, Table 3 "No"): then a parameter, which `renormalise` puts back on the sphere.
    merge: how the views meet before the assignment. "shared": one head for both (GOCA, Sep). "separate": a head each
        (SView: two independent networks; GOCA with `heads` 2). "average": their mean goes through one head (Avg).
    """

    def __init__(self, prototypes, arch="s3d", width=1.0, hidden=2048, pool="avg", merge="shared",
                 train_prototypes=False, views=VIEWS):
        super().__init__()
        self.backbones = nn.ModuleDict({v: Backbone(arch, CHANNELS[v], width, pool) for v in VIEWS if v in views})
        feature_dim = next(iter(self.backbones.values())).feature_dim
        n_heads = len(self.backbones) if merge == "separate" else 1
        self.heads = nn.ModuleList(Head(feature_dim, hidden, prototypes.shape[1]) for _ in range(n_heads))
        prototypes = F.normalize(prototypes.float(), dim=1)
        if train_prototypes:
            self.prototypes = nn.Parameter(prototypes)
        else:
            self.register_buffer("prototypes", prototypes)
        self.merge = merge

    def features(self, view, clips):
        """Backbone features of one view: clips [B, C, T, S, S] -> [B, feature_dim]."""
        return self.backbones[view](clips)

    def forward(self, clips, frozen=None, scored=False):
        """Clips -> unit features [G, V, m, d] (G = 2 views, or 1 for "average" and of one view; V crops; m videos).

        clips: a list over lengths (long, short) of {"rgb": [m, v, 3, T, S, S], "flow": [m, v, 2, T, S, S]}.
        frozen: a view that gets no gradient.
        scored: give (features, their scores [G, V, m, N]); DistributedDataParallel has to see all parameters in here.
        """
        m = len(next(iter(clips[0].values())))
        feats = []
        for view in self.backbones:
            with torch.set_grad_enabled(torch.is_grad_enabled() and view != frozen):
                per_length = [self.features(view, c[view].flatten(0, 1)).unflatten(0, (m, -1)) for c in clips]
            feats.append(torch.cat(per_length, dim=1).transpose(0, 1).flatten(0, 1))  # [V m, feature_dim], crop first
        if self.merge == "average":
            feats = [(feats[0] + feats[1]) / 2]
        out = [self.heads[i % len(self.heads)](f) for i, f in enumerate(feats)]  # G of [V m, d]
        out = torch.stack([f.detach() if view == frozen else f for view, f in zip(self.backbones, out, strict=False)])
        features = F.normalize(out.float(), dim=-1).unflatten(1, (-1, m))
        return (features, self.scores(features)) if scored else features

    @torch.no_grad()
    def renormalise(self, stepped):
        """Give the rows of trained prototypes unit length again, after an optimizer step.

        stepped: a bool tensor on their device, whether the step was done; else they keep their bits.
        """
        if isinstance(self.prototypes, nn.Parameter):
            self.prototypes.copy_(torch.where(stepped, F.normalize(self.prototypes, dim=1), self.prototypes))

    def scores(self, features):
        """Similarities S = F P^T, float32 whatever autocast says: [..., d] -> [..., N]."""
        with torch.autocast(features.device.type, enabled=False):
            return features.float() @ self.prototypes.T


def two_view(settings, prototypes):
    """The TwoView that a run's settings describe, freshly initialised from settings["seed"].

    settings: arch, width, hidden, pool, method, heads, train_prototypes, views, seed, as pretrain.py stores them.
    prototypes: [N, d].
    """
    torch.manual_seed(settings["seed"])
    merge = "separate" if settings.get("heads") == 2 else METHODS[settings["method"]]
    return TwoView(prototypes, settings["arch"], settings["width"], settings["hidden"], settings["pool"], merge,
                   settings.get("train_prototypes", False), settings.get("views", VIEWS))
