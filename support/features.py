"""Backbone features of every video of a list, extracted once and kept (section 4.2; stage 4's first half).

In   a checkpoint of pretrain.py (or `none`: the untrained network) or backbones of weights.py, the videos of a subset
     and their flow store.
Out  one .npz a subset and protocol: rgb and flow (of whichever there is a network) float32 [n, D] (the mean over a
     video's test views), labels int64 [n], names [n], and a header that says of which weights, videos, flow and views.
     Retrieval, clusters and the linear probe read it; a file that is not of exactly these weights, videos, flow and
     views is refused, and so is one of a film that has another size in bytes since.

Work is kept every 16 videos, so an interrupted extraction goes on where it was; several processes share the blocks.
"""

import hashlib
import json
import os
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import data
import model
from support.checkpoints import load_pretrained
from support.cli import say
from support.distributed import run_on_all_ranks
from support.errors import BadInput
from support.files import check_folder, load_arrays, save_arrays
from support.inference import group_by_views, mean_over_views
from support.loader import Loader
from support.weights import Backbones, load, view_and_path

BLOCK = 16  # videos between two saves
AGAIN = "the same command, once it is removed"  # makes a file that is damaged
NETWORK = ("arch", "width", "pool", "frames", "size", "stride")  # settings that decide what a feature is


class Features(NamedTuple):
    """Of the n videos of a subset that could be read."""
    values: dict  # view -> float32 [n, D]
    labels: torch.Tensor  # int64 [n]
    videos: list  # of datasets.Video
    classes: list  # names
    skipped: list  # messages: what is listed and not among the n


def load_network(s):
    """--checkpoint or --weights -> (network in eval mode, its settings); what a flag says must agree with them."""
    given = {k: getattr(s, k) for k in NETWORK}
    free = {k: given[k] for k in ("frames", "size", "stride") if given[k] is not None}
    if s.weights:
        net, settings = load(*s.weights, pool=s.pool)
        check_network_flags(given, settings, f"--weights {s.checkpoint}")
    elif s.checkpoint == "none":
        settings = {"arch": "s3d", "width": 1.0, "pool": "avg", "frames": 32, "size": 128, "stride": 1, "hidden": 8,
                    "method": "goca", "seed": s.seed, **{k: v for k, v in given.items() if v is not None}}
        net = model.two_view(settings, torch.eye(2))
    else:
        state = load_pretrained(s.checkpoint)
        settings = {**state["settings"], "step": state["step"]}
        check_network_flags(given, settings, s.checkpoint)
        net = model.two_view(settings, state["model"]["prototypes"])
        net.load_state_dict(state["model"])
    settings |= free
    if why := model.too_small(settings["arch"], settings["frames"], settings["size"]):
        raise BadInput(f"{why}: raise --frames or --size")
    return net.eval(), settings


def check_network_flags(given, settings, what):
    """Refuse flags that ask for another network than the one that was loaded."""
    for k in ("arch", "width", "pool"):
        if given[k] is not None and given[k] != settings[k]:
            raise BadInput(f"{what} was trained with --{k} {settings[k]}, not {given[k]}; leave the flag out")


def fingerprint(module):
    """SHA-256 of a module's parameters and buffers, bit by bit."""
    h = hashlib.sha256()
    for name, t in module.state_dict().items():
        h.update(name.encode() + t.detach().cpu().contiguous().numpy().tobytes())
    return h.hexdigest()


def only_views(net, views):
    """The part of a network that is of some of its views; the network itself where those are all."""
    return net if set(views) == set(net.backbones) else Backbones({v: net.backbones[v] for v in views})


def check_store(store, settings, s):
    """Refuse a flow store made with other settings than the one that the checkpoint was trained on."""
    trained = settings.get("flow_header")
    if trained is None or trained == store.header:
        return
    keys = sorted(k for k in trained.keys() | store.header.keys() if trained.get(k) != store.header.get(k))
    what = ", ".join(f"{k}: {trained.get(k)} in training, {store.header.get(k)} here" for k in keys)
    raise BadInput(f"the flow in {s.flow} was made with other settings than the checkpoint's ({what}); extract it "
                   f"with the same")


def check_rate(settings, rgb):
    """Refuse frames at another rate (flow.py --fps) than a network was trained on, where RGB is read without flow.

    rgb: the RgbStore that is read, or None: videos, whose frames are as stored. Of others' weights nothing is known.
    """
    trained = settings.get("rgb_fps", (settings.get("flow_header") or {}).get("fps", 0))
    here = rgb.header.get("fps", 0) if rgb else 0
    if trained != here and settings.keys() & {"rgb_fps", "flow_header"}:
        said = {fps: f"at {fps:g} a second" if fps else "as stored" for fps in (trained, here)}
        cure = f"give --rgb, a store of frames {said[trained]}" if trained else "leave --rgb out"
        raise BadInput(f"the network was trained on frames {said[trained]} (flow.py --fps), and here they are "
                       f"{said[here]}; {cure}")


def view_features(net, protocol, clips):
    """Features of test views: {view: [B, C, T, S, S]} -> {view: [B, D]}, of unit length but under protocol "coclr"."""
    f = {view: net.features(view, c) for view, c in clips.items()}
    return f if protocol == "coclr" else {view: F.normalize(each, dim=1) for view, each in f.items()}


@torch.inference_mode()
def extract_blocks(net, videos, store, s, device, what, keep, done=(), rgb=None):
    """Features of `videos` block by block; calls keep(block, {view: float32 [k, D], "kept", "faults"}).

    kept: places in `videos` of the k that could be read. done: blocks to leave out. store: None where the network is
    of RGB alone. rgb: an RgbStore that is read in place of the videos, or None.
    """
    views = tuple(net.backbones)
    clips = data.TestClips(videos, store, views=views, protocol=s.protocol, frames=s.frames, size=s.size,
                           stride=s.stride, rgb=rgb)
    places = range(len(videos))
    blocks = {b: places[b * BLOCK:(b + 1) * BLOCK] for b in range(-(-len(videos) // BLOCK)) if b not in done}
    own = [i for block in blocks.values() for i in block]
    call = partial(view_features, net, s.protocol)
    items = iter(Loader(clips, lambda done: {"sampler": own[done:], "batch_size": None}, s.workers))
    progress = tqdm(total=len(videos), initial=len(videos) - len(own), desc=what, unit="video", mininterval=1)

    for b, block in blocks.items():
        parts, kept, faults = [], [], []
        for group in group_by_views(islice(items, len(block)), s.batch_views):
            progress.update(len(group))
            faults += [i["fault"] for i in group if "fault" in i]
            group = [i for i in group if "fault" not in i]
            if group:
                parts.append(mean_over_views(call, group, views, device, s.batch_views))
                kept += [i["index"] for i in group]
        values = {v: torch.cat([p[v] for p in parts]) if parts else torch.zeros(0, net.backbones[v].feature_dim)
                  for v in views}
        for i, *rows in zip(kept, *values.values(), strict=True):
            if not all(r.isfinite().all() for r in rows):
                raise BadInput(f"the features of {videos[i].path} are not finite: the weights of {s.checkpoint} "
                               f"are damaged or its training diverged; take an earlier checkpoint")
        keep(b, {**{v: t.numpy() for v, t in values.items()}, "kept": np.array(kept, np.int64),
                 "faults": np.array(faults, str)})
    progress.close()


def bytes_of(video, views, store, rgb):
    """Size of the file that a video's clips of `views` come from, RGB's where there is one; 0: not known, or
    a folder."""
    path = store.path(video.name) if "rgb" not in views else rgb.path(video.name) if rgb else video.path
    try:
        return os.path.getsize(path) if os.path.isfile(path) else 0
    except OSError:
        return 0


def changed(then, now):
    """Places of the files that have another size now; 0 is none."""
    return [i for i, (a, b) in enumerate(zip(then, now, strict=True)) if a and b and a != b]


def join_blocks(parts):
    """Blocks of `extract_video` in order -> one."""
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0] if all(k in p for p in parts)}


def place_of(net, found, store, s, device, what, rgb=None):
    """-> (header of a VideoSet's features by a network, its hash, the file that keeps them or None)."""
    of_flow = "flow" in net.backbones
    header = {"weights": fingerprint(net.backbones), **{k: getattr(s, k) for k in (*NETWORK, "protocol")},
              "precision": "bf16" if device.type == "cuda" else "float32", "flow": store.header if of_flow else None,
              "videos": hashlib.sha256(json.dumps([(v.name, v.label) for v in found.videos]).encode()).hexdigest(),
              "without_flow": [v.name for v in found.videos if v.name not in store] if of_flow else None}
    if rgb and "rgb" in net.backbones:
        header["rgb"] = rgb.header
    key = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
    at = Path(view_and_path(s.weights[-1])[1] if s.weights else s.checkpoint)
    folder = s.features or (None if s.checkpoint == "none" else (at if at.is_dir() else at.parent) / "features")
    return header, key, folder and Path(folder) / f"{s.dataset}-{what}-{s.protocol}-{key}.npz"


def load_or_extract(net, found, store, s, device, what, rank=0, world=1, whole=None, rgb=None):
    """The features of a VideoSet, from the file that holds them if there is one -> Features (None on rank > 0).

    store: None where the network is of RGB alone. whole: a network of more views, of which `net` is a part: where its
    features are kept, they are taken. rgb: an RgbStore that is read in place of the videos.
    Raises BadInput where none of the videos can be read, or the file is of other weights, videos, flow or views.
    """
    videos, views = found.videos, tuple(net.backbones)
    header, key, path = place_of(net, found, store, s, device, what, rgb)
    if path is None and world > 1:
        raise BadInput("several processes need --features, the folder in which they share their work")
    if path and not path.exists() and whole not in (None, net) and store:
        *of_whole, other = place_of(whole, found, store, s, device, what, rgb)
        # of the same videos: of what lacks flow, or whose flow is damaged, it has none
        if other.exists() and len(load_arrays(other, "features", "")[1]["kept"]) == len(videos):
            (header, key), path, views = of_whole, other, tuple(whole.backbones)
    if path is None or not path.exists():
        if path:
            run_on_all_ranks(lambda: check_folder(path.parent, "--features"))
        joined = _extract_all(net, videos, store, s, device, what, path, rank, world, rgb)
        if rank == 0:
            header |= {"key": key, "classes": found.classes}
            joined |= {"names": np.array([videos[i].name for i in joined["kept"]], str),
                       "labels": np.array([videos[i].label for i in joined["kept"]], np.int64)}
            if path and len(joined["kept"]):
                save_arrays(path, "features", header, **joined)
                say(f"written: {path}")
            if path:  # of nothing, too: the same command is to try again
                for part in path.parent.glob(f".{path.stem}-*.npz"):
                    part.unlink(missing_ok=True)
    elif rank == 0:
        header, joined = load_arrays(path, "features", AGAIN)
        if header.get("key") != key:
            raise BadInput(f"{path} holds the features of another checkpoint, data set or protocol; remove it")
        if not all(np.isfinite(joined[v]).all() for v in net.backbones):
            raise BadInput(f"{path} holds features that are not finite; remove it")
        if "bytes" in joined and ("rgb" in net.backbones or "rgb" not in views):  # else of films that aren't read here
            other = changed(joined["bytes"], [bytes_of(v, views, store, rgb) for v in videos])
            if other:
                raise BadInput(f"{path} holds features of {len(other)} of {len(videos)} videos whose files have "
                               f"another size now, the first {videos[other[0]].name}; remove it, and all is made anew")
        say(f"features of {len(joined['kept'])} {what} videos: {path}")
    if rank:
        return None
    faults = [str(f) for f in joined["faults"]]
    if not len(joined["kept"]):
        raise BadInput(f"none of the {len(videos)} {what} videos can be read; the first: {faults[0]}")
    return Features({v: torch.from_numpy(joined[v]) for v in net.backbones}, torch.from_numpy(joined["labels"]),
                    [videos[i] for i in joined["kept"]], found.classes,
                    found.skipped() + faults)


def _extract_all(net, videos, store, s, device, what, path, rank, world, rgb):
    """`extract_video` shared by all processes and kept in parts beside `path` -> everything on rank 0."""
    blocks = -(-len(videos) // BLOCK)
    if path is None:
        parts = {}
        extract_blocks(net, videos, store, s, device, what, parts.__setitem__, rgb=rgb)
        return join_blocks([parts[b] for b in range(blocks)])

    def part(b):
        return path.parent / f".{path.stem}-{b:05d}.npz"

    now = {b: np.array([bytes_of(v, net.backbones, store, rgb) for v in videos[b * BLOCK:(b + 1) * BLOCK]], np.int64)
           for b in range(rank, blocks, world)}  # before the files are read

    def keep(b, arrays):
        save_arrays(part(b), "part of features", {}, bytes=now[b], **arrays)

    def is_done(b):
        try:
            return part(b).exists() and not changed(
                load_arrays(part(b), "part of features", AGAIN)[1].get("bytes", now[b]), now[b])
        except BadInput:  # named when the parts are joined
            return True

    done = {b for b in range(blocks) if b % world != rank or is_done(b)}
    extract_blocks(net, videos, store, s, device, what, keep, done, rgb)
    if world > 1:
        dist.barrier()
    if rank:
        return None
    try:
        return join_blocks([load_arrays(part(b), "part of features", AGAIN)[1] for b in range(blocks)])
    except BadInput:
        if not path.exists():
            raise
        return load_arrays(path, "features", AGAIN)[1]  # another evaluation of these videos was done before this


def prepare(features, protocol):
    """Averaged features [n, D] of one view and subset -> unit rows; "coclr" centres each set by its own mean."""
    if protocol == "coclr":
        features = features - features.mean(0)
    return F.normalize(features, dim=1)


def view_matrix(values, view, protocol, fusion):
    """Features {view: [n, D]} -> the unit rows [n, D] whose inner products are the similarities of `view`.

    "rgb+flow": "average" is the mean of both unit features, of unit length again (paper); "similarity" adds both
    similarities (CoCLR, ViCC), which is the inner product of the features side by side, [n, 2D].
    """
    each = [prepare(values[v], protocol) for v in view.split("+")]
    if len(each) == 1:
        return each[0]
    return F.normalize(sum(each), dim=1) if fusion == "average" else torch.cat(each, dim=1) / len(each) ** 0.5
