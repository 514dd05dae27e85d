"""Videos in, clips out: split files, decoding, the flow store, clip sampling and augmentation (paper section 4).

In   the four data sets in the layouts and split files that their authors publish, or a plain folder of videos, and
     the optical flow that flow.py wrote beside them (the flow store; its format is in stores.py).
Out  training: for each video the clips of both views, "2 long + 4 short" (multi-temporal-resolution, section 4), RGB
     and flow of one clip cut from the same frames, the same place and with the same flip.
     testing: 3 spatial x 10 temporal views, or sliding windows, without augmentation.

Workers decode, cut and resize on uint8 (`TrainClips`, `TestClips`); flip, colour and blur run on whole batches of
tensors on the training device (`augment`). Everything random follows from (seed, epoch, index of the video) alone.

Conventions. A video of n decoded frames has n-1 flow frames (flow t moves frame t to frame t+1), so a clip draws its
frames from the first n-1. A video shorter than a clip is repeated from its start. Declared frame counts are not used.
"""

import json
import math
import os
import signal
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from stores import (  # noqa: F401  (the stages' door to the file formats)
    BOUND,
    AviReader,
    BadInput,
    FlowStore,
    atomic,
    command_line,
    dequantise,
    load_arrays,
    load_checkpoint,
    quantise,
    save_arrays,
    save_checkpoint,
    write_avi,
)

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read once by OpenCV; our sentence instead of a codec's
VIDEO_SUFFIXES = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"}


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------
def decode(path):
    """Yield the frames of a video in one sequential pass, uint8 [H, W, 3], BGR as OpenCV gives them.

    Raises BadInput, naming the file, if it can't be opened or has no frame. A file cut short gives what decodes.
    """
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        if not os.path.isfile(path):
            raise BadInput(f"{path} doesn't exist")
        if os.path.getsize(path) == 0:
            raise BadInput(f"{path} is empty (zero bytes)")
        video = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        n = 0
        while True:
            ok, frame = video.read()
            if not ok:
                break
            n += 1
            yield frame
        video.release()
        if n == 0:
            raise BadInput(f"{path} holds no frame that OpenCV can decode; is it a video?")
    finally:
        cv2.utils.logging.setLogLevel(level)


# ---------------------------------------------------------------------------------------------------------------------
# Split files: which videos a data set has, as its authors publish them
# ---------------------------------------------------------------------------------------------------------------------
class Video(NamedTuple):
    path: str
    name: str  # path below --videos without suffix: its key in the flow store
    label: int  # -1 where there are no labels


class VideoSet(NamedTuple):
    videos: list  # of Video
    classes: list  # of class names; a label is a place in it
    absent: list  # what the split file names and the folder lacks


def find_videos(root):
    """All video files below `root` -> {name: path}, sorted by name.

    Raises BadInput: no such folder, no video in it, or two files of one name.
    """
    if not os.path.isdir(root):
        raise BadInput(f"{root} is no folder; --videos takes the folder that holds the videos")
    found = {}
    for folder, _, files in os.walk(root):
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in VIDEO_SUFFIXES and not file.startswith("."):
                path = os.path.join(folder, file)
                name = os.path.relpath(os.path.join(folder, stem), root)
                if name in found:
                    raise BadInput(f"{found[name]} and {path} differ by suffix only, so their flow would have one "
                                   f"name; rename one")
                found[name] = path
    if not found:
        raise BadInput(f"{root} holds no video ({', '.join(sorted(VIDEO_SUFFIXES))})")
    return dict(sorted(found.items()))


def _split_file(splits, *names):
    """The first of `names` found in `splits` or one folder below."""
    for name in names:
        for path in [Path(splits) / name, *sorted(Path(splits).glob(f"*/{name}"))]:
            if path.is_file():
                return path
    raise BadInput(f"{splits} lacks {' or '.join(names)}; --splits takes the folder of the data set's official lists")


def _lines(path):
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _ucf101(found, splits, split, subset):
    # "1 ApplyEyeMakeup"; "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1", the label on training lists only
    classes = [line.split()[1] for line in _lines(_split_file(splits, "classInd.txt"))]
    listed = [line.split()[0] for line in _lines(_split_file(splits, f"{subset}list{split:02d}.txt"))]
    return classes, [(os.path.splitext(e)[0], e.split("/")[0]) for e in listed]


def _hmdb51(found, splits, split, subset):
    # brush_hair_test_split1.txt: "<file> 1" (train), 2 (test), 0 (unused)
    ending, wanted = f"_test_split{split}.txt", {"train": "1", "test": "2"}[subset]
    files = sorted(Path(splits).rglob(f"*{ending}"))
    if not files:
        raise BadInput(f"{splits} lacks <class>{ending}; --splits takes HMDB51's testTrainMulti_7030_splits")
    entries = []
    for file in files:
        label = file.name.removesuffix(ending)
        rows = (line.rsplit(maxsplit=1) for line in _lines(file))
        entries += [(f"{label}/{os.path.splitext(e)[0]}", label) for e, use in rows if use == wanted]
    return [f.name.removesuffix(ending) for f in files], entries


def _k400(found, splits, split, subset):
    # official csv (label,youtube_id,time_start,...), or "class/id_start_end frames label", or train|val/<class>/ alone
    part = {"train": "train", "test": "val"}[subset]
    if splits is None:
        return _by_folder(found, part)
    path = _split_file(splits, f"{part}.csv", *(["validate.csv"] if part == "val" else []), f"{part}_videofolder.txt")
    if path.suffix == ".csv":
        rows = [line.split(",") for line in _lines(path)[1:]]
        entries = [(f"{r[1]}_{int(r[2]):06d}_{int(r[3]):06d}", r[0].strip('"').replace(" ", "_")) for r in rows]
    else:
        rows = [line.rsplit(maxsplit=2)[0] for line in _lines(path)]
        entries = [(os.path.basename(r), os.path.dirname(r).replace(" ", "_")) for r in rows]
    return sorted({label for _, label in entries}), entries


def _diving48(found, splits, split, subset):
    # [{"vid_name": ..., "label": 0..47, "start_frame": ..., "end_frame": ...}, ...], one file a subset
    path = _split_file(splits, f"Diving48_V2_{subset}.json")
    classes = ["-".join(c) for c in json.loads(_split_file(splits, "Diving48_vocab.json").read_text())]
    return classes, [(e["vid_name"], classes[e["label"]]) for e in json.loads(path.read_text())]


def _by_folder(found, part):
    """Labels from folders: <part>/<class>/..., or <class>/... where there is no such division (training only)."""
    parts = {n.split(os.sep)[0] for n in found}
    below = 1 if part in parts else 0
    if not below and part != "train":
        raise BadInput(f"--videos has no folder {part}/, so there is nothing to test on; divide it "
                       f"in train/ and {part}/")
    names = [n.split(os.sep) for n in found]
    names = [n for n in names if not below or n[0] == part]
    entries = [(os.sep.join(n), n[below] if len(n) > below + 1 else None) for n in names]
    return sorted({label for _, label in entries if label is not None}), entries


def _folder(found, splits, split, subset):
    return _by_folder(found, subset)


DATASETS = {"folder": _folder, "ucf101": _ucf101, "hmdb51": _hmdb51, "k400": _k400, "diving48": _diving48}


def read_split(dataset, videos, splits=None, split=1, subset="train"):
    """The videos of one subset of a data set -> VideoSet, in the split file's order.

    dataset: a key of DATASETS. videos: the folder of videos. splits: the folder of the official lists (none needed for
    "folder"; optional for "k400"). split: 1-3 (UCF101, HMDB51). subset: "train" or "test".
    Raises BadInput where a folder or list is missing or malformed, or none of the listed videos is there.
    """
    if splits is None and dataset not in ("folder", "k400"):
        raise BadInput(f"--dataset {dataset} needs --splits, the folder of its official lists")
    if splits is not None and not os.path.isdir(splits):
        raise BadInput(f"--splits {splits} is no folder")
    found = find_videos(videos)
    try:
        classes, entries = DATASETS[dataset](found, splits, split, subset)
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise BadInput(f"--splits {splits} is not in {dataset}'s published format ({type(e).__name__}: {e})") from e
    lookup = {n: n for n in found}
    if dataset in ("k400", "diving48"):  # their lists name videos by id, wherever the file lies
        lookup |= {os.path.basename(n): n for n in found}
    label_of = {c: i for i, c in enumerate(classes)}
    kept, absent = [], []
    for entry, label in entries:
        name = lookup.get(entry)
        if name is None:
            absent.append(entry)
        else:
            kept.append(Video(found[name], name, label_of.get(label, -1)))
    if not kept:
        raise BadInput(f"none of the {len(entries)} videos of {dataset}'s {subset} list is below {videos} "
                       f"(the first would be {absent[0] if absent else '-'})")
    return VideoSet(kept, classes, absent)


# ---------------------------------------------------------------------------------------------------------------------
# Clips
# ---------------------------------------------------------------------------------------------------------------------
class Box(NamedTuple):
    """A square of a frame in fractions: side of the short side, x and y of the room that is left."""
    side: float
    x: float
    y: float


def cut(frame, box, size):
    """Cut a square out of a frame and resize it: uint8 [H, W, ...] -> [size, size, ...].

    The same box cuts the same place out of RGB and flow, whatever the resolution of either (to half a pixel).
    """
    h, w = frame.shape[:2]
    side = max(1, round(min(h, w) * box.side))
    y, x = round((h - side) * box.y), round((w - side) * box.x)
    how = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    return cv2.resize(frame[y:y + side, x:x + side], (size, size), interpolation=how)


def read_frames(video, store, frames_of):
    """The frames of both views that some clips need, in one pass over the video.

    frames_of(n) -> list of index lists, from the number of usable frames n. -> (index lists, rgb {t: [H, W, 3] RGB},
    flow {t: [h, w, 2]}), uint8. Raises BadInput, naming the file, if video or flow can't be read or do not match.
    """
    reader = store.open(video.name)
    indices = frames_of(len(reader))
    wanted = sorted({t for clip in indices for t in clip})
    rgb, need = {}, set(wanted)
    for t, frame in enumerate(decode(video.path)):
        if t in need:
            rgb[t] = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
            if t == wanted[-1]:
                break
    if len(rgb) < len(wanted):
        raise BadInput(f"{video.path} has fewer frames than its flow in {store.root}; has it changed? Remove "
                       f"{store.path(video.name)} and run flow.py again")
    flow = {t: np.stack(np.split(plane, 2), axis=-1) for t, plane in zip(wanted, reader.read(wanted), strict=True)}
    return indices, rgb, flow


def clip_indices(start, frames, stride, n):
    """Frames of a clip; past the end of a short video it starts again."""
    return [(start + stride * i) % n for i in range(frames)]


def _stack(frames, indices, box, size):
    return torch.from_numpy(np.stack([cut(frames[t], box, size) for t in indices]))


class TrainClips(Dataset):
    """A video's training crops: `n_long` clips of `frames` and `n_short` of `short_frames`, of both views.

    item (epoch, index) -> {"long": c, "short": c, "index": index, "fault": ""}, c = {"rgb": uint8 [v, T, S, S, 3],
    "flow": uint8 [v, T, S, S, 2], "params": float32 [v, 6]}; params are flip, brightness, contrast, saturation, hue and
    blur sigma, for `augment`. Place, time and flip are shared by both views of a crop.

    scale: the short side to which a frame is resized before the size x size crop, over size, drawn uniformly from this
    range (136-190 over 128 for S3D; 128-160 over 112 for R(2+1)D-18).
    cache: keep every decoded video in memory, for small data sets (3 + 2 bytes a pixel and frame).
    A video that can't be read is replaced by another, drawn from the same seed, and `fault` says why.
    """

    JITTER, P_JITTER, P_GREY, P_BLUR = (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 0.5

    def __init__(self, videos, store, *, frames=32, short_frames=16, n_long=2, n_short=4, size=128, stride=1,
                 scale=(136 / 128, 190 / 128), seed=0, cache=False):
        self.videos, self.store, self.size = videos, store, size
        self.stride, self.scale, self.seed = stride, scale, seed
        self.lengths = {"long": [frames] * n_long, "short": [short_frames] * n_short}
        self.cache = {} if cache else None

    def __len__(self):
        return len(self.videos)

    def _params(self, rng):
        """One crop's box and its six numbers for `augment`."""
        box = Box(1 / rng.uniform(*self.scale), rng.uniform(), rng.uniform())
        b, c, s, h = self.JITTER if rng.uniform() < self.P_JITTER else (0, 0, 0, 0)
        colour = [rng.uniform(1 - b, 1 + b), rng.uniform(1 - c, 1 + c), rng.uniform(1 - s, 1 + s), rng.uniform(-h, h)]
        if rng.uniform() < self.P_GREY:
            colour[2] = 0.0  # grey is no saturation
        sigma = rng.uniform(0.1, 2.0) if rng.uniform() < self.P_BLUR else 0.0
        return box, [float(rng.uniform() < 0.5), *colour, sigma]

    def __getitem__(self, item):
        epoch, index = item
        rng = np.random.default_rng([self.seed, epoch, index])
        fault = ""
        for _ in range(100):
            try:
                return {**self._crops(self.videos[index], rng), "index": index, "fault": fault}
            except BadInput as e:
                fault = fault or str(e)
                index = int(rng.integers(len(self.videos)))
        raise BadInput(f"100 videos in a row can't be read; the first: {fault}")

    def _crops(self, video, rng):
        lengths = self.lengths["long"] + self.lengths["short"]

        def draw(n):
            starts = [int(rng.integers(max(1, n - self.stride * (t - 1)))) for t in lengths]
            return [clip_indices(s, t, self.stride, n) for s, t in zip(starts, lengths, strict=True)]

        if self.cache is None:
            indices, rgb, flow = read_frames(video, self.store, draw)
        else:
            if video.name not in self.cache:
                self.cache[video.name] = read_frames(video, self.store, lambda n: [range(n)])[1:]
            rgb, flow = self.cache[video.name]
            indices = draw(len(flow))
        out, at = {}, 0
        for kind, group in self.lengths.items():
            drawn = [self._params(rng) for _ in group]
            clips = list(zip(indices[at:at + len(group)], (box for box, _ in drawn), strict=True))
            at += len(group)
            if group:
                out[kind] = {"rgb": torch.stack([_stack(rgb, i, box, self.size) for i, box in clips]),
                             "flow": torch.stack([_stack(flow, i, box, self.size) for i, box in clips]),
                             "params": torch.tensor([p for _, p in drawn], dtype=torch.float32)}
        return out


class TestClips(Dataset):
    """A video's test views, without augmentation: index -> {"rgb": uint8 [K, T, S, S, 3], "flow": ..., "weight"}.

    protocol "goca": 3 places along the longer side x 10 times evenly spread, K = 30 (paper, section 4). "coclr":
    windows of T frames every 15 over the whole video, centre place (CoCLR, ViCC). A square is the whole short side.
    Views that coincide, as in short videos and square frames, come once, with their share of the mean as `weight` [K].
    A video that can't be read gives {"fault": why}.
    """

    def __init__(self, videos, store, *, protocol="goca", frames=32, size=128, stride=1):
        self.videos, self.store, self.frames, self.size, self.stride = videos, store, frames, size, stride
        self.protocol = protocol

    def __len__(self):
        return len(self.videos)

    def starts(self, n):
        """First frames of the views of a video with n usable frames."""
        room = max(0, n - self.stride * (self.frames - 1) - 1)
        if self.protocol == "goca":
            return [round(t) for t in np.linspace(0, room, 10)]
        return list(range(0, room + 1, 15))

    def __getitem__(self, index):
        try:
            clips, rgb, flow = read_frames(self.videos[index], self.store, lambda n: [
                clip_indices(s, self.frames, self.stride, n) for s in self.starts(n)])
        except BadInput as e:
            return {"index": index, "fault": str(e)}
        h, w = next(iter(rgb.values())).shape[:2]
        places = (0, 0.5, 1) if self.protocol == "goca" and h != w else (0.5,)  # a square frame has one place
        count = Counter((tuple(i), place) for i in clips for place in places)
        views = [(i, Box(1, place, place)) for i, place in count]
        return {"rgb": torch.stack([_stack(rgb, i, box, self.size) for i, box in views]),
                "flow": torch.stack([_stack(flow, i, box, self.size) for i, box in views]),
                "weight": torch.tensor([n / sum(count.values()) for n in count.values()]), "index": index}


def start_worker(worker):
    """worker_init_fn of a DataLoader: the processes are the parallelism, and they end when the main process says so."""
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the main process still wants its step's data
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Batches(Sampler):
    """Batches of (epoch, index) for one process out of `world`, from global step `start` to the last epoch's end.

    Every epoch is a new permutation from (seed, epoch); the global batch is the same however many processes share it.
    What does not fill a batch is left out, as in SwAV.
    """

    def __init__(self, n, batch_size, epochs, seed=0, rank=0, world=1, start=0):
        self.steps_per_epoch = n // (batch_size * world)
        if self.steps_per_epoch == 0:
            raise BadInput(f"--batch-size {batch_size} x {world} process(es) is more than the {n} videos there are; "
                           f"choose {max(1, n // world)} or less")
        self.n, self.batch_size, self.epochs, self.seed = n, batch_size, epochs, seed
        self.rank, self.world, self.start = rank, world, start

    def __len__(self):
        return self.steps_per_epoch * self.epochs - self.start

    def __iter__(self):
        for epoch in range(self.start // self.steps_per_epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            first = self.start % self.steps_per_epoch if epoch == self.start // self.steps_per_epoch else 0
            for step in range(first, self.steps_per_epoch):
                at = (step * self.world + self.rank) * self.batch_size
                yield [(epoch, int(i)) for i in order[at:at + self.batch_size]]


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: whole batches of tensors, on the training device
# ---------------------------------------------------------------------------------------------------------------------
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as CoCLR and the released code
GREY = (0.299, 0.587, 0.114)


def _colour_matrices(params):
    """Brightness, saturation and hue of each clip as one 3 x 3 matrix: [B, 6] -> [B, 3, 3].

    Hue turns the chroma plane of YIQ by 2 pi hue; saturation scales it.
    """
    yiq = params.new_tensor([GREY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
    brightness, saturation, hue = params[:, 1], params[:, 3], params[:, 4] * 2 * math.pi
    turn = torch.zeros(len(params), 3, 3, dtype=params.dtype, device=params.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * hue.cos()
    turn[:, 2, 1] = saturation * hue.sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    return brightness[:, None, None] * (torch.linalg.inv(yiq) @ turn @ yiq)


def _blur_matrices(sigma, size):
    """Gaussian blur along one axis as a matrix, edges by reflection: [B] -> [B, size, size]."""
    at = torch.arange(size, device=sigma.device)
    out = torch.zeros(len(sigma), size, size, device=sigma.device)
    radius = min(size - 1, 6)  # 3 sigma at the largest sigma of 2 px
    for d in range(-radius, radius + 1):
        source = (at + d).abs()
        source = torch.where(source >= size, 2 * (size - 1) - source, source)  # ... 2 1 0 1 2 ...
        weight = torch.exp(-d * d / (2 * sigma.clamp(min=1e-3) ** 2))
        out[:, at, source] += weight[:, None]
    return out / out.sum(-1, keepdim=True)


def colour(x, params):
    """Jitter, grey and blur of RGB clips: float [B, T, S, S, 3] in 0..1, params [B, 6] -> the same shape.

    Each clip has one setting for all its frames. Order: brightness, saturation and hue, contrast (about the clip's mean
    grey), blur; clamped once at the end.
    """
    b, s = len(x), x.shape[2]
    x = (x.flatten(1, 3) @ _colour_matrices(params).transpose(1, 2)).view(x.shape)
    contrast = params[:, 2].view(b, 1, 1, 1, 1)
    mean = (x.mean((1, 2, 3)) @ x.new_tensor(GREY)).view(b, 1, 1, 1, 1)
    x = x * contrast + (1 - contrast) * mean
    blurred = params[:, 5].nonzero().flatten()
    if len(blurred):
        g = _blur_matrices(params[blurred, 5], s)[:, None, None]  # [b', 1, 1, S, S]
        y = (g @ x[blurred].movedim(-1, 2) @ g.mT).movedim(2, -1)  # rows and columns, colour by colour
        x = x.index_copy(0, blurred, y)
    return x.clamp(0, 1)


def normalise_rgb(x):
    """RGB [..., T, S, S, 3] in 0..1 -> [..., 3, T, S, S] by ImageNet's statistics, channels last in memory."""
    return ((x - x.new_tensor(MEAN)) / x.new_tensor(STD)).movedim(-1, -4)


def normalise_flow(x):
    """Stored flow uint8 [..., T, S, S, 2] -> [..., 2, T, S, S], u and v over 20 px, in -1..1; channels last."""
    return ((x.float() - 128) / 127).movedim(-1, -4)


def augment(batch, device):
    """A collated batch of TrainClips -> the clips that model.TwoView takes, on `device`.

    -> [{"rgb": float32 [m, v, 3, T, S, S], "flow": [m, v, 2, T, S, S]}, ...] for long and short clips. Flow gets no
    colour operation; a flip mirrors both views and negates u.
    """
    out = []
    for kind in ("long", "short"):
        if kind not in batch:
            continue
        c = {k: t.to(device, non_blocking=True) for k, t in batch[kind].items()}
        lead, params = c["rgb"].shape[:2], c["params"].flatten(0, 1)
        rgb = normalise_rgb(colour(c["rgb"].flatten(0, 1).float() / 255, params))
        flow = normalise_flow(c["flow"].flatten(0, 1))
        flip = params[:, 0].view(-1, 1, 1, 1, 1) > 0
        rgb = torch.where(flip, rgb.flip(-1), rgb)
        negate_u = flow.new_tensor([-1, 1]).view(2, 1, 1, 1)
        flow = torch.where(flip, flow.flip(-1) * negate_u, flow)
        out.append({"rgb": rgb.unflatten(0, lead), "flow": flow.unflatten(0, lead)})
    return out
