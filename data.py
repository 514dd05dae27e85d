"""Videos in, clips out: clip sampling and augmentation (paper section 4).

In   videos (videos.py finds them by the data sets' official lists) and the optical flow that flow.py wrote (the flow
     store; its format is in stores.py).
Out  training: for each video the clips of both views, "2 long + 4 short" (multi-temporal-resolution, section 4), RGB
     and flow of one clip cut from the same frames, the same place and with the same flip.
     testing: 3 spatial x 10 temporal views, or sliding windows, without augmentation.

Workers decode, cut and resize on uint8 (`TrainClips`, `TestClips`); flip, colour and blur run on whole batches of
tensors on the training device (`augment`). Everything random follows from (seed, epoch, index of the video) alone.

Conventions. A video of n decoded frames has n-1 flow frames (flow t moves frame t to frame t+1), so a clip draws its
frames from the first n-1. A video shorter than a clip is repeated from its start. Declared frame counts are not used.
"""

import math
import signal
from collections import Counter
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
    last_checkpoint,
    load_arrays,
    load_checkpoint,
    quantise,
    save_arrays,
    save_checkpoint,
    save_run,
    write_avi,
)
from videos import DATASETS, VIDEO_SUFFIXES, Video, VideoSet, decode, find_videos, frames_at, read_split, scan, within  # noqa: F401


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
    how = cv2.INTER_AREA if side >= 2 * size else cv2.INTER_LINEAR  # below, bilinear misses nothing and is fast
    return cv2.resize(frame[y:y + side, x:x + side], (size, size), interpolation=how)


def read_frames(video, store, frames_of):
    """The frames of both views that some clips need, in one pass over the video.

    frames_of(n) -> list of index lists, from the number of usable frames n. -> (index lists, rgb {t: [H, W, 3] BGR},
    flow {t: [2h, w], u over v}), uint8. Raises BadInput, naming the file, if video or flow can't be read or do not
    match.
    """
    reader = store.open(video.name)
    indices = frames_of(len(reader))
    wanted = sorted({t for clip in indices for t in clip})
    rgb = frames_at(video.path, wanted)
    if len(rgb) < len(wanted):
        raise BadInput(f"{video.path} has fewer frames than its flow in {store.root}; has it changed? Remove "
                       f"{store.path(video.name)} and run flow.py again")
    return indices, rgb, dict(zip(wanted, reader.read(wanted), strict=True))


def clip_indices(start, frames, stride, n):
    """Frames of a clip; past the end of a short video it starts again."""
    return [(start + stride * i) % n for i in range(frames)]


def cut_clips(rgb, flow, clips, size):
    """Cut clips of one length out of what `read_frames` gave -> {"rgb": [v, T, S, S, 3], "flow": [v, T, S, S, 2]}.

    clips: [(frame indices, Box)]. Colour order and u, v are sorted after the cut, where frames are small.
    """
    shape = len(clips), len(clips[0][0]), size, size
    out = {"rgb": np.empty((*shape, 3), np.uint8), "flow": np.empty((*shape, 2), np.uint8)}
    for k, (indices, box) in enumerate(clips):
        for i, t in enumerate(indices):
            cv2.cvtColor(cut(rgb[t], box, size), cv2.COLOR_BGR2RGB, dst=out["rgb"][k, i])
            cv2.merge([cut(plane, box, size) for plane in np.split(flow[t], 2)], dst=out["flow"][k, i])
    return {view: torch.from_numpy(x) for view, x in out.items()}


class TrainClips(Dataset):
    """A video's training crops: `n_long` clips of `frames` and `n_short` of `short_frames`, of both views.

    item (epoch, index) -> {"long": c, "short": c, "index": index, "fault": ""}, c = {"rgb": uint8 [v, T, S, S, 3],
    "flow": uint8 [v, T, S, S, 2], "params": float32 [v, 6]}; params are flip, brightness, contrast, saturation, hue and
    blur sigma, for `augment`. Place, time and flip are shared by both views of a crop.

    scale: the short side to which a frame is resized before the size x size crop, over size, drawn uniformly from this
    range (136-190 over 128 for S3D; 128-160 over 112 for R(2+1)D-18).
    cache: keep every decoded video in memory, for small data sets (3 + 2 bytes a pixel and frame).
    A video that can't be read, or takes more than `time_limit` seconds, is replaced by another, drawn from the same
    seed; `fault` says which and why.
    """

    JITTER, P_JITTER, P_GREY, P_BLUR = (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 0.5

    def __init__(self, videos, store, *, frames=32, short_frames=16, n_long=2, n_short=4, size=128, stride=1,
                 scale=(136 / 128, 190 / 128), seed=0, cache=False, time_limit=60):
        self.videos, self.store, self.size = videos, store, size
        self.stride, self.scale, self.seed, self.time_limit = stride, scale, seed, time_limit
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
                crops = within(self.time_limit, self.videos[index].path, self._crops, self.videos[index], rng)
                return {**crops, "index": index, "fault": fault}
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
                out[kind] = {**cut_clips(rgb, flow, clips, self.size),
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
        return {**cut_clips(rgb, flow, views, self.size),
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
    What does not fill a batch is left out, as in SwAV, or, with keep_last, is an epoch's last and smaller one: parts
    that differ by one video at most, and left out only where a process would have none.
    """

    def __init__(self, n, batch_size, epochs, seed=0, rank=0, world=1, start=0, keep_last=False):
        self.batch, rest = batch_size * world, n % (batch_size * world)
        self.rest = rest if keep_last and rest >= world else 0
        self.steps_per_epoch = n // self.batch + (self.rest > 0)
        if n < self.batch:
            raise BadInput(f"--batch-size {batch_size} x {world} process(es) is more than the {n} videos there are; "
                           f"choose {max(1, n // world)} or less")
        self.n, self.batch_size, self.epochs, self.seed = n, batch_size, epochs, seed
        self.rank, self.world, self.start = rank, world, start

    def __len__(self):
        return self.steps_per_epoch * self.epochs - self.start

    def rows(self, step):
        """The number of videos of each process in a global step."""
        last = self.rest and step % self.steps_per_epoch == self.steps_per_epoch - 1
        size, more = divmod(self.rest if last else self.batch, self.world)
        return [size + (rank < more) for rank in range(self.world)]

    def __iter__(self):
        for epoch in range(self.start // self.steps_per_epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            first = self.start % self.steps_per_epoch if epoch == self.start // self.steps_per_epoch else 0
            for step in range(first, self.steps_per_epoch):
                rows = self.rows(step)
                at = step * self.batch + sum(rows[:self.rank])
                yield [(epoch, int(i)) for i in order[at:at + rows[self.rank]]]


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
    """Jitter, grey and blur of RGB clips: float [B, 3, T, S, S] in 0..1, params [B, 6] -> the same shape.

    Each clip has one setting for all its frames. Order: brightness, saturation and hue, contrast (about the clip's mean
    grey), blur; clamped once at the end, so that all but the blur are one matrix and one shift of each clip's colours.
    """
    matrices, contrast = _colour_matrices(params), params[:, 2, None, None]
    mean = x.new_tensor([GREY]) @ matrices @ x.mean((2, 3, 4))[..., None]  # [B, 1, 1], after the matrix
    y = torch.baddbmm((1 - contrast) * mean, contrast * matrices, x.flatten(2)).view_as(x)
    blurred = params[:, 5].nonzero().flatten()
    if len(blurred):
        g = _blur_matrices(params[blurred, 5], x.shape[-1])[:, None, None]  # [b', 1, 1, S, S]
        y[blurred] = g @ y[blurred] @ g.mT  # rows and columns
    return y.clamp_(0, 1)


def normalise_rgb(x):
    """RGB [..., T, S, S, 3] in 0..1 -> [..., 3, T, S, S] by ImageNet's statistics, channels last in memory."""
    return (x - x.new_tensor(MEAN)).div_(x.new_tensor(STD)).movedim(-1, -4)


def normalise_flow(x):
    """Stored flow uint8 [..., T, S, S, 2] -> [..., 2, T, S, S], u and v over 20 px, in -1..1; channels last."""
    return (x.float() - 128).div_(127).movedim(-1, -4)


def augment(batch, device):
    """A collated batch of TrainClips -> the clips that model.TwoView takes, on `device`.

    -> [{"rgb": float32 [m, v, 3, T, S, S], "flow": [m, v, 2, T, S, S]}, ...] for long and short clips. Flow gets no
    colour operation; a flip mirrors both views and negates u.
    """
    out = []
    for kind in ("long", "short"):
        if kind not in batch:
            continue
        c = {k: t.to(device, non_blocking=True).flatten(0, 1) for k, t in batch[kind].items()}
        clips = {view: torch.empty(c[view].movedim(-1, 1).shape, device=device, memory_format=torch.channels_last_3d)
                 for view in ("rgb", "flow")}
        at_once = len(c["params"]) if c["params"].is_cuda else 1  # one clip stays in a CPU's cache
        for i in range(0, len(c["params"]), at_once):
            part = slice(i, i + at_once)
            params = c["params"][part]
            flip = params[:, 0].view(-1, 1, 1, 1, 1) > 0
            # colours and u, v as planes [B, C, T, S, S], still 8 bit: contiguous rows for all that follows
            rgb, flow = (c[view][part].movedim(-1, 1).contiguous() for view in ("rgb", "flow"))
            rgb, flow = (torch.where(flip, x.flip(-1), x) for x in (rgb, flow))
            clips["rgb"][part] = normalise_rgb(colour(rgb.float().div_(255), params).movedim(1, -1))
            clips["flow"][part] = normalise_flow(flow.movedim(1, -1))
            clips["flow"][part, 0] *= 1 - 2 * flip[:, 0].float()
        out.append({view: x.unflatten(0, batch[kind][view].shape[:2]) for view, x in clips.items()})
    return out
