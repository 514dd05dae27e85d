"""Backbones alone: other people's weights taken in (`evaluate.py --weights`), a run's given out (`evaluate.py export`).

In   files of the released GOCA, ViCC and CoCLR, of torchvision's s3d and r2plus1d_18, or an export of this project.
Out  `Backbones`, which has the interface of model.TwoView that evaluation needs, and settings as a checkpoint has them.

Files are read with torch.load(weights_only=True): tensors and plain values, nothing is executed. FORMATS says under
which prefix a file keeps each view's network and which of its keys are no backbone (heads, queues, prototypes, momentum
encoders); S3D_NAMES and R2PLUS1D_NAMES are the names of their modules. Every backbone key must be found, with its
shape, and every other key be known; what isn't is listed in the error.

Their networks are this project's (no gates, no biases before batch norm), but for torchvision's s3d, whose batch norms
have eps 0.001. Their input is not: the flow networks of all three see a colour picture, (128, v, u) in 0..255, 20 px at
either end (OpenCV wrote u, v, 128 as blue, green, red; PIL and PyAV read that as RGB), normalised by ImageNet's
statistics; torchvision's see RGB normalised by Kinetics'. `Adapted` turns what data.py makes into that.
"""

import pickle
import re
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import data
import model
from support.checkpoints import load_pretrained
from support.errors import BadInput
from support.files import atomic

KEPT = ("arch", "width", "pool", "frames", "size", "stride", "method", "dataset", "split", "epochs", "global_batch",
        "optimizer", "lr", "lambda1", "lambda2", "prior_sign", "guide_start", "lead", "lead_epochs",
        "seed", "flow_header", "rgb_fps", "views")
_ONE = {"0": "conv", "1": "bn"}
_SPLIT = {"0.0": "conv1", "0.1": "bn1", "1.0": "conv2", "1.1": "bn2"}
_MIXED = {**{f"branch0.{a}": f"branch0.0.{b}" for a, b in _ONE.items()},
          **{f"branch{i}.0.{a}": f"branch{i}.0.{b}" for i in (1, 2) for a, b in _ONE.items()},
          **{f"branch{i}.1.{a}": f"branch{i}.1.{b}" for i in (1, 2) for a, b in _SPLIT.items()},
          **{f"branch3.1.{a}": f"branch3.1.{b}" for a, b in _ONE.items()}}
# CoCLR's S3D, which ViCC and GOCA took over, registers each layer twice: by its name and in its block.
_S3D_LAYERS = ((0, "Conv_1a", "block1.0", _SPLIT), (2, "Conv_2b", "block2.1", _ONE), (3, "Conv_2c", "block2.2", _SPLIT),
               *((i, f"Mixed_{name}", block, _MIXED) for i, name, block in (
                   (5, "3b", "block3.1"), (6, "3c", "block3.2"), (8, "4b", "block4.1"), (9, "4c", "block4.2"),
                   (10, "4d", "block4.3"), (11, "4e", "block4.4"), (12, "4f", "block4.5"), (14, "5b", "block5.1"),
                   (15, "5c", "block5.2"))))
S3D_NAMES = {f"layers.{i}.{a}": (f"{name}.{b}", f"{block}.{b}")
             for i, name, block, unit in _S3D_LAYERS for a, b in unit.items()}
TORCHVISION_S3D_NAMES = {m: (m.replace("layers", "features"),) for m in S3D_NAMES}
_BLOCK = {f"conv{i}.{a}": f"conv{i}.{b}" for i in (1, 2)
          for a, b in (("0.0", "0.0"), ("0.1", "0.1"), ("1.0", "0.3"), ("1.1", "1"))}
R2PLUS1D_NAMES = {  # torchvision's, which GOCA took over
    "layers.0.0": ("stem.0",), "layers.0.1": ("stem.1",), "layers.1.0": ("stem.3",), "layers.1.1": ("stem.4",),
    **{f"layers.{2 + n}.{a}": (f"layer{1 + n // 2}.{n % 2}.{b}",) for n in range(8) for a, b in _BLOCK.items()},
    **{f"layers.{2 + n}.shortcut.{i}": (f"layer{1 + n // 2}.0.downsample.{i}",) for n in (2, 4, 6) for i in (0, 1)}}


class Layout(NamedTuple):
    arch: str
    names: dict
    eps: float  # of batch norm
    frames: int  # of a clip, its px and stride: as they were trained, unless a flag says otherwise
    size: int
    stride: int


class Format(NamedTuple):
    """One kind of file. prefixes: view -> what stands before its network's keys. other: regex of keys that are no
    backbone's. statistics: mean and standard deviation that their input is normalised by."""
    name: str
    prefixes: dict
    other: str
    statistics: tuple
    layouts: tuple


IMAGENET = (data.MEAN, data.STD)
KINETICS = ((0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989))
S3D = Layout("s3d", S3D_NAMES, 1e-5, 32, 128, 1)
R2PLUS1D = Layout("r2plus1d18", R2PLUS1D_NAMES, 1e-5, 16, 112, 1)
FORMATS = (
    Format("GOCA (released)", {"rgb": "video_network.", "flow": "video_network_flow."},
           r"projection_head(_flow)?\.|prototypes\.|linear_classifier\.|video_network(_flow)?\.fc\.", IMAGENET,
           (S3D, R2PLUS1D)),
    Format("CoCLR or ViCC", {v: "encoder_q.0." for v in model.VIEWS},
           r"encoder_q\.[24]\.|encoder_k\.|sampler\.|queue|prototypes\.", IMAGENET, (S3D,)),
    Format("CoCLR or ViCC, classifier", {v: "backbone." for v in model.VIEWS}, r"final_(bn|fc)\.", IMAGENET, (S3D,)),
    Format("torchvision", {"rgb": ""}, r"classifier\.|fc\.", KINETICS,
           (Layout("s3d", TORCHVISION_S3D_NAMES, 1e-3, 32, 224, 2), R2PLUS1D._replace(stride=2))))
REFUSED = {"gating_b0": "it is S3D-G, with gates; S3D without gates can be taken in",
           "spatial_conv": "it is ViCC's R(2+1)D, which has one block a layer and another stem: no R(2+1)D-18; of ViCC "
                           "S3D can be taken in"}


class Adapted(model.Backbone):
    """A backbone of three input channels, each an affine image of a channel of this project's input.

    view "rgb": [B, 3, T, S, S] normalised by ImageNet's statistics -> by `statistics`. view "flow": (u, v) over 20 px,
    [B, 2, T, S, S] -> the picture (128, v, u) / 255, normalised by `statistics`.
    """

    def __init__(self, arch, view, statistics, pool="avg"):
        super().__init__(arch, 3, 1.0, pool)
        (m0, m1, m2), std = statistics
        if view == "rgb":
            rows = [(i, data.STD[i], data.MEAN[i]) for i in range(3)]  # picture = x std + mean
        else:
            rows = [(0, 0.0, 128 / 255), (1, 0.5, 0.5), (0, 0.5, 0.5)]  # picture = (20 x + 20) / 40
        self.register_buffer("channel", torch.tensor([c for c, _, _ in rows]))
        self.register_buffer("scale", self._column([a / s for (_, a, _), s in zip(rows, std, strict=True)]))
        self.register_buffer("shift", self._column([(b - m) / s for (_, _, b), m, s in
                                                    zip(rows, (m0, m1, m2), std, strict=True)]))

    @staticmethod
    def _column(values):
        return torch.tensor(values).view(1, 3, 1, 1, 1)

    def forward(self, x):
        x = x.index_select(1, self.channel) * self.scale + self.shift
        return super().forward(x.contiguous(memory_format=torch.channels_last_3d))


class Backbones(nn.Module):
    """Backbones of one or both views, in eval mode: what features.py and classifiers.py need of model.TwoView."""

    def __init__(self, backbones):
        super().__init__()
        self.backbones = nn.ModuleDict({v: backbones[v] for v in model.VIEWS if v in backbones})
        self.eval()

    def features(self, view, clips):
        """Backbone features of one view: clips [B, C, T, S, S] -> [B, feature_dim]."""
        return self.backbones[view](clips)


def read_state(path):
    """A file of torch.save, onto the CPU, executing nothing. Raises BadInput where it is missing, damaged or more."""
    if not Path(path).is_file():
        raise BadInput(f"{path} doesn't exist; --weights takes files: FILE, rgb=FILE or flow=FILE")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        found = re.search(r"GLOBAL ([\w.]+)", str(e))
        if found:
            raise BadInput(
                f"{path} holds Python objects ({found[1]}) beside its tensors, and loading those could run code; save "
                f"its tensors alone where you trust it: torch.save(torch.load(FILE, weights_only=False)"
                f"['state_dict'], NEW)") from e
        raise BadInput(f"{path} is damaged or no file of torch.save") from e
    except Exception as e:  # torch and zipfile each have their own words
        raise BadInput(f"{path} is damaged or no file of torch.save ({type(e).__name__})") from e


def abbreviated(names, n=8):
    names = list(names)
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def recognise(path, keys):
    """The format and layout of a file with these keys. Raises BadInput where there is none."""
    for mark, why in REFUSED.items():
        if any(mark in k for k in keys):
            raise BadInput(f"{path} can't be taken in: {why}")
    for form in FORMATS:
        for layout in form.layouts:
            first = next(iter(layout.names.values()))
            if any(f"{prefix}{name}.weight" in keys for prefix in form.prefixes.values() for name in first):
                return form, layout
    raise BadInput(f"{path} holds no network of a known layout; known are {abbreviated(f.name for f in FORMATS)} "
                   f"and this project's export; it holds: {abbreviated(keys, 5) or 'no tensor'}")


def fill(path, backbone, state, prefix, form, layout):
    """Copy a network's tensors to their places. Raises BadInput, listing them, if keys are missing, unknown or amiss.

    A layer that the file has under two names must be the same under both. Batch norm's count of batches, which
    evaluation does not use, may be missing.
    """
    own = backbone.net.state_dict()
    missing, amiss, used = [], [], set()
    for key, target in own.items():
        module, kind = key.rsplit(".", 1)
        names = [f"{prefix}{name}.{kind}" for name in layout.names[module]]
        found = [name for name in names if name in state]
        used.update(found)
        if not found and kind != "num_batches_tracked":
            missing.append(names[0])
        for name in found:
            if state[name].shape != target.shape:
                amiss.append(f"{name} is {list(state[name].shape)}, not {list(target.shape)}")
            elif not torch.equal(state[name], state[found[0]]):
                amiss.append(f"{name} differs from {found[0]}, which is the same layer")
        if found and not amiss:
            target.copy_(state[found[0]])
    others = [p for p in form.prefixes.values() if p != prefix]
    unknown = [k for k in state if k not in used and not re.match(form.other, k)
               and not any(k.startswith(p) for p in others)]
    wrong = [f"{what}: {abbreviated(names)}" for what, names in (
        ("missing", missing), ("of another shape", amiss), ("not known", unknown)) if names]
    if wrong:
        raise BadInput(f"{path} looks like {form.name}'s {layout.arch}, but not all keys fit: {'; '.join(wrong)}")


def _foreign(path, state, view, pool):
    """One file of FORMATS -> ({view: Adapted}, settings)."""
    state = state.get("state_dict", state)
    if not isinstance(state, dict):
        raise BadInput(f"{path} holds a {type(state).__name__} as its state_dict")
    state = {k.removeprefix("module."): t for k, t in state.items() if isinstance(t, torch.Tensor)}
    form, layout = recognise(path, state)
    views = [v for v, p in form.prefixes.items() if any(k.startswith(p) for k in state)]
    if view:
        if view not in views:
            raise BadInput(f"{path} holds no network for {view}; it is {form.name}'s for {abbreviated(views)}")
        views = [view]
    elif len(set(form.prefixes[v] for v in views)) < len(views):
        raise BadInput(f"{path} is {form.name}'s, which does not say of which view it is; write --weights "
                       f"rgb={path} or flow={path}")
    out = {}
    for v in views:
        out[v] = Adapted(layout.arch, v, form.statistics, pool or "avg")
        fill(path, out[v], state, form.prefixes[v], form, layout)
        for m in out[v].modules():
            if isinstance(m, nn.BatchNorm3d):
                m.eps = layout.eps
    return out, {"arch": layout.arch, "width": 1.0, "pool": pool or "avg", "frames": layout.frames,
                 "size": layout.size, "stride": layout.stride, "method": form.name}


def _own(path, state, view, pool):
    """One file of `export` -> ({view: Backbone}, settings)."""
    if state.get("version") != 1:
        raise BadInput(f"{path} is an export of version {state.get('version')}, but 1 is needed")
    settings = state["settings"]
    if pool and pool != settings["pool"]:
        raise BadInput(f"{path} was trained with --pool {settings['pool']}, not {pool}; leave the flag out")
    out, there = {}, [v for v in model.VIEWS if v in state]
    if not there or (view and view not in there):
        raise BadInput(f"{path} holds no network{f' for {view}' if view else ''}; it is an export "
                       f"{f'for {there[0]} only' if there else 'that is damaged'}")
    for v in [view] if view else there:
        out[v] = model.Backbone(settings["arch"], model.CHANNELS[v], settings["width"], settings["pool"])
        try:
            out[v].load_state_dict(state[v])
        except RuntimeError as e:
            raise BadInput(f"{path} is damaged: {' '.join(str(e).split())}") from e
    return out, settings


def view_and_path(file):
    """[rgb=|flow=]FILE -> (view or "", FILE), in whose path there may be another =."""
    return file.split("=", 1) if file.startswith(("rgb=", "flow=")) else ("", file)


def load(*files, pool=None):
    """Backbones from one or two files -> (Backbones in eval mode, settings).

    files: FILE, or rgb=FILE and flow=FILE; two of them must be of one architecture. pool: "avg" or "1x2x2", as
    model.Backbone. Raises BadInput where a file is of no known kind or its keys do not fit.
    """
    backbones, settings = {}, {}
    for file in files:
        view, path = view_and_path(file)
        state = read_state(path)
        if not isinstance(state, dict):
            raise BadInput(f"{path} holds a {type(state).__name__}, no state dict")
        if state.get("kind") == "checkpoint":
            raise BadInput(f"{path} is a checkpoint of pretrain.py; give it as --checkpoint {path}")
        some, its = (_own if state.get("kind") == "backbones" else _foreign)(path, state, view, pool)
        for v in some.keys() & backbones.keys():
            raise BadInput(f"--weights {' '.join(files)}: the network for {v} is given twice; write rgb=FILE and "
                           f"flow=FILE")
        if settings and (its["arch"], its["width"]) != (settings["arch"], settings["width"]):
            raise BadInput(f"--weights {' '.join(files)}: {its['arch']} and {settings['arch']} can't be fused; "
                           f"evaluate them one by one")
        backbones |= some
        settings = settings or its
    return Backbones(backbones), settings


def export(checkpoint, path):
    """Write the backbones of a run, without head, prototypes and optimizer, to a file that `load` reads.

    It is a torch.save of {"settings": plain values, "rgb": state dict of model.Backbone, "flow": likewise}, of the
    views that were trained. Paths that the run's settings hold are left out.
    """
    state = load_pretrained(checkpoint)
    settings = {k: v for k, v in state["settings"].items() if k in KEPT}
    parts = {v: {k.removeprefix(f"backbones.{v}."): t.clone() for k, t in state["model"].items()
                 if k.startswith(f"backbones.{v}.")} for v in settings.get("views", model.VIEWS)}
    with atomic(path) as tmp:
        torch.save({"kind": "backbones", "version": 1, "settings": {**settings, "step": state["step"]}, **parts}, tmp)
