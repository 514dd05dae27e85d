"""Videos in, clips out: clip sampling and augmentation (paper section 4).

In   videos (support/datasets.py finds them by the data sets' official lists) and the optical flow that flow.py wrote
     (the flow store, support/stores.py), perhaps its store of RGB too, which is then read in place of the videos.
Out  training: for each video the clips of both views, "2 long + 4 short" (multi-temporal-resolution, section 4), RGB
     and flow of one clip cut from the same frames, the same place and with the same flip.
     testing: 3 spatial x 10 temporal views, or sliding windows, without augmentation.

Workers decode (support/frames.py), cut and resize (support/crops.py) on uint8, one frame after the other while it is in
the cache (`TrainClips`, `TestClips`); support/epoch_batches.py chooses the videos of each batch. Flip, colour and blur
run on whole batches of tensors on the training device (`augment`). Everything random follows from (seed, epoch, index
of the video) alone.

Conventions. A video of n decoded frames has n-1 flow frames (flow t moves frame t to frame t+1), so a clip draws its
frames from the first n-1. A video shorter than a clip is repeated from its start. Declared frame counts are not used,
but for RGB alone without any store (`views=("rgb",)`), and there only as far as they hold.
"""

import copy
import math
import sys
from collections import Counter
from functools import lru_cache
from itertools import count, repeat

import cv2
import numpy as np
import torch

from support.crops import Box, cut_clips
from support.errors import BadInput
from support.frames import READ_ERRORS, EndsEarly, error_message, open_views, read_frames, shape_of_film
from support.loader import Clips
from support.videos import FilmReader, declared_frames, decode, film_length, with_time_limit


# ---------------------------------------------------------------------------------------------------------------------
# Clips
# ---------------------------------------------------------------------------------------------------------------------
def clip_indices(start, frames, stride, n):
    """Frames of a clip; past the end of a short video it starts again."""
    return [(start + stride * i) % n for i in range(frames)]


def bytes_of_pixel(views):
    return 3 * ("rgb" in views) + 2 * ("flow" in views)


# short side of a frame before the crop, over the crop's: 136-190 px over 128 for S3D, 128-160 over 112 for R(2+1)D-18
SCALES = {"s3d": (136 / 128, 190 / 128), "r2plus1d18": (128 / 112, 160 / 112)}


def default_scale(arch):
    """The range of --scale: a backbone of one's own takes that of R(2+1)D-18."""
    return SCALES.get(arch, SCALES["r2plus1d18"])


class TrainClips(Clips):
    """A video's training crops: `n_long` clips of `frames` and `n_short` of `short_frames`, of both views.

    item (epoch, index) -> {"long": c, "short": c, "index": index, "fault": ""}, c = {"rgb": uint8 [v, T, S, S, 3],
    "flow": uint8 [v, T, S, S, 2], "params": float32 [v, 6]}; params are flip, brightness, contrast, saturation, hue and
    blur sigma, for `augment`. Place, time and flip are shared by both views of a crop.

    scale: the short side to which a frame is resized before the size x size crop, over size, drawn uniformly from this
    range (`SCALES`).
    cache: keep every decoded video in memory, for small data sets (3 + 2 bytes a pixel and frame).
    rgb: an RgbStore, to read in place of the videos; the clips are the same but for its JPEGs.
    views: one alone gives the same clips of it; ("flow",) reads no video, ("rgb",) no flow: store may then be None.
    still_jitter: params get a seventh number, the share of a clip's still picture that `augment` takes off RGB,
        min(1, U(0, still_jitter)); ours, not the paper's (docs/training.md, "Small machines").
    A video that can't be read, or takes more than `time_limit` seconds, is replaced by another, drawn from the same
    seed; `fault` says which and why.
    """

    JITTER, P_JITTER, P_GREY, P_BLUR = (0.4, 0.4, 0.2, 0.1), 0.8, 0.2, 0.5

    def __init__(self, videos, store, *, frames=32, short_frames=16, n_long=2, n_short=4, size=128, stride=1,
                 scale=SCALES["s3d"], seed=0, cache=False, time_limit=60, rgb=None, views=("rgb", "flow"),
                 still_jitter=0.0):
        super().__init__(videos)
        self.store, self.rgb = (store if "flow" in views else None), (rgb if "rgb" in views else None)
        self.views, self.size, self.declared = views, size, {}
        self.stride, self.scale, self.seed, self.time_limit = stride, scale, seed, time_limit
        self.still_jitter = still_jitter
        self.lengths = {"long": [frames] * n_long, "short": [short_frames] * n_short}
        self.cache = {} if cache else None

    def item_bytes(self):
        return sum(map(sum, self.lengths.values())) * self.size ** 2 * bytes_of_pixel(self.views)

    def _params(self, rng):
        """One crop's box and its numbers for `augment`."""
        box = Box(1 / rng.uniform(*self.scale), rng.uniform(), rng.uniform())
        b, c, s, h = self.JITTER if rng.uniform() < self.P_JITTER else (0, 0, 0, 0)
        colour = [rng.uniform(1 - b, 1 + b), rng.uniform(1 - c, 1 + c), rng.uniform(1 - s, 1 + s), rng.uniform(-h, h)]
        if rng.uniform() < self.P_GREY:
            colour[2] = 0.0  # grey is no saturation
        sigma = rng.uniform(0.1, 2.0) if rng.uniform() < self.P_BLUR else 0.0
        params = [float(rng.uniform() < 0.5), *colour, sigma]
        if self.still_jitter:
            params.append(min(1.0, rng.uniform(0, self.still_jitter)))
        return box, params

    def __getitem__(self, item):
        epoch, index = item
        key, fault = [self.seed, epoch, index], ""
        for attempt in range(100):
            # a generator an attempt: the thread of one that stalled may still draw from its own
            rng = np.random.default_rng([*key, attempt] if attempt else key)
            if attempt:
                index = int(rng.integers(len(self.videos)))
            video = self.videos[index]
            try:
                with self.reading(index):
                    crops = with_time_limit(self.time_limit, video.path, self._crops, video, rng)
                return {**crops, "index": index, "fault": fault}
            except READ_ERRORS as e:
                fault = fault or error_message(video, e)
        raise BadInput(f"100 videos in a row can't be read; the first: {fault}")

    def _open(self, video):
        """-> (usable frames of a video, function of their ascending indices that yields as `read_frames`, shape of its
        frames or None where they come)."""
        flow, rgb = open_views(video, self.store, self.rgb)
        shape = None if "rgb" in self.views else shape_of_film(flow)
        n = len(flow) if flow else max(1, (len(rgb) if rgb else self._declared_frames(video)) - 1)
        if self.cache is None:
            return n, lambda wanted: read_frames(video, flow, wanted, rgb, views=self.views), shape
        if video.name not in self.cache:
            decoded = zip(count(), decode(video.path), repeat(None)) if not (flow or rgb) else read_frames(
                video, flow, range(n), rgb, views=self.views)
            self.cache[video.name] = list(decoded)
        return n, lambda wanted: self._held(video, wanted), shape

    def _declared_frames(self, video):
        """Of a film of which nothing is in a store; looked up once."""
        if video.path not in self.declared:
            self.declared[video.path] = film_length(video.path)
        return self.declared[video.path]

    def _held(self, video, wanted):
        held = self.cache[video.name]
        if wanted[-1] >= len(held):
            raise EndsEarly(video.path, len(held))
        return (held[t] for t in wanted)

    def _crops(self, video, rng):
        n, frames, shape = self._open(video)
        again = copy.deepcopy(rng)
        try:
            return self._draw(n, frames, shape, rng)
        except EndsEarly as e:
            if not e.frames:
                raise
            return self._draw(max(1, e.frames - 1), frames, shape, again)

    def _draw(self, n, frames, shape, rng):
        """The crops of a film of n usable frames."""
        clips = {}
        for group, lengths in self.lengths.items():
            starts = [int(rng.integers(max(1, n - self.stride * (t - 1)))) for t in lengths]
            clips[group] = [clip_indices(start, t, self.stride, n) for start, t in zip(starts, lengths, strict=True)]
        drawn = {group: [self._params(rng) for _ in lengths] for group, lengths in self.lengths.items()}
        boxed = {group: [(indices, box) for indices, (box, _) in zip(clips[group], drawn[group], strict=True)]
                 for group in clips if clips[group]}
        wanted = sorted({t for group in boxed.values() for indices, _ in group for t in indices})
        return {group: {**views, "params": torch.tensor([p for _, p in drawn[group]], dtype=torch.float32)}
                for group, views in cut_clips(frames(wanted), boxed, self.size, self.views, shape).items()}


SPREAD = {"goca": (10, (0, 0.5, 1)), "fast": (4, (0.5,))}  # protocols of evenly spread test views: times, places


class TestClips(Clips):
    """A video's test views, without augmentation: index -> {"rgb": uint8 [K, T, S, S, 3], "flow": ..., "weight"}.

    protocol "goca": 3 places along the longer side x 10 times evenly spread, K = 30 (paper, section 4). "fast": the
    centre x 4 times. "coclr": windows of T frames every 15 over the whole video, centre place (CoCLR, ViCC). A square
    is the whole short side.
    views: one alone gives the same clips of it; ("rgb",) asks for no flow store, ("flow",) for no video. rgb: an
    RgbStore, to read in place of the videos.
    Views that coincide, as in short videos and square frames, come once, with their share of the mean as `weight` [K].
    A video that can't be read, or takes more than `time_limit` seconds, all its views together, gives {"fault": why}.
    """

    def __init__(self, videos, store, *, views=("rgb", "flow"), protocol="goca", frames=32, size=128, stride=1,
                 time_limit=600, rgb=None):
        super().__init__(videos)
        self.store, self.rgb = (store if "flow" in views else None), (rgb if "rgb" in views else None)
        self.frames, self.size, self.stride = frames, size, stride
        self.views, self.protocol, self.reader = views, protocol, None
        self.time_limit = time_limit

    def item_bytes(self):
        # of one test view; how many there are depends on the video
        return self.frames * self.size ** 2 * bytes_of_pixel(self.views)

    def starts(self, n):
        """First frames of the views of a video with n usable frames."""
        room = max(0, n - self.stride * (self.frames - 1) - 1)
        if self.protocol in SPREAD:
            return [round(t) for t in np.linspace(0, room, SPREAD[self.protocol][0])]
        return list(range(0, room + 1, 15))

    def __getitem__(self, index):
        try:
            with self.reading(index):
                video, views = self.videos[index], self._views if self.store or self.rgb else self._rgb_views
                return {**with_time_limit(self.time_limit, video.path, views, video), "index": index}
        except READ_ERRORS as e:
            self.reader = None  # a stalled one's thread may still hold it
            return {"index": index, "fault": error_message(self.videos[index], e)}

    def _plan(self, n, square):
        """Test views of n usable frames -> ([(frame indices, Box), ...], their weights [K], ascending frames)."""
        clips = [clip_indices(start, self.frames, self.stride, n) for start in self.starts(n)]
        _, places = SPREAD.get(self.protocol, (0, (0.5,)))
        count = Counter((tuple(i), place) for i in clips for place in ((0.5,) if square else places))
        weight = torch.tensor([n / sum(count.values()) for n in count.values()])
        return [(i, Box(1, place, place)) for i, place in count], weight, sorted({t for clip in clips for t in clip})

    def _views(self, video):
        flow, rgb = open_views(video, self.store, self.rgb)
        (h, w), height = (flow.shape, 2) if flow else (rgb.shape, 1)  # u over v
        n = len(flow) if flow else max(1, len(rgb) - 1)
        # of a piece of a film there is the piece's own flow (flow.py --segment), or that of the whole film
        own = flow is None or "first_frame" in flow.header
        skip = 0 if own else video.first
        if video.frames and not own:
            n = min(n - skip, max(1, video.frames - 1))
            if n < 1:
                raise BadInput(f"{video.path} has flow up to frame {video.first} only; extract its flow again: "
                               f"{flow.command}")
        reader = None
        if video.frames and "rgb" in self.views and not rgb:
            reader = self._reader(video, self.store.frames_of(video.name) if own else len(flow) + 1)
        views, weight, wanted = self._plan(n, h == height * w)
        come = ((t - skip, *both) for t, *both in read_frames(video, flow, [skip + t for t in wanted], rgb, reader,
                                                              self.views, video.first - skip))
        shape = None if "rgb" in self.views else shape_of_film(flow)
        return {**cut_clips(come, {"views": views}, self.size, self.views, shape)["views"], "weight": weight}

    def _rgb_views(self, video):
        """Without flow. Planned by the frames that the file declares, and again where others decode."""
        h, w = next(decode(video.path)).shape[:2]  # refuses what is no video, before anything else opens it
        frames = video.frames or declared_frames(video.path) or 1
        while True:
            # the last one is left out as where there is flow, which has one less
            views, weight, wanted = self._plan(max(1, frames - 1), h == w)
            beyond = [frames - 1] if video.frames else [frames - 1, frames]  # does it end where it says?
            reader = self._reader(video)
            come = ((t - video.first, frame, None) for t, frame in
                    reader.frames_at([video.first + t for t in sorted({*wanted, *beyond})]))
            cut = cut_clips(come, {"views": views}, self.size, self.views)["views"]
            if reader.position > video.first + frames and not video.frames:
                for _ in reader.frames_at([sys.maxsize]):
                    pass
            found = reader.position - video.first
            if found <= 0:
                raise BadInput(f"{video.path} ends at frame {reader.position}, before frame {video.first}; has it "
                               f"changed?")
            if found == frames:
                return {**cut, "weight": weight}
            frames = found

    def _reader(self, video, frames=None):
        """A decoder that is not beyond the first frame of `video`; that of the piece before, if it is of one film.
        frames: of FilmReader."""
        if not self.reader or self.reader.path != video.path or self.reader.position > video.first:
            self.reader = FilmReader(video.path, frames)
        return self.reader


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: whole batches of tensors, on the training device
# ---------------------------------------------------------------------------------------------------------------------
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as CoCLR and the released code
GREY = (0.299, 0.587, 0.114)
YIQ = (GREY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))
RGB_OF_YIQ = tuple(map(tuple, np.linalg.inv(YIQ).tolist()))


@lru_cache
def _constant(values, device):
    """A tuple of numbers on a device, moved there once: moving waits for the device."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def _colour_matrices(params):
    """Brightness, saturation and hue of each clip as one 3 x 3 matrix: [B, 6] -> [B, 3, 3].

    Hue turns the chroma plane of YIQ by 2 pi hue; saturation scales it.
    """
    brightness, saturation, hue = params[:, 1], params[:, 3], params[:, 4] * 2 * math.pi
    turn = torch.zeros(len(params), 3, 3, dtype=params.dtype, device=params.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * hue.cos()
    turn[:, 2, 1] = saturation * hue.sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    to_yiq, back = _constant(YIQ, params.device), _constant(RGB_OF_YIQ, params.device)
    return brightness[:, None, None] * (back @ turn @ to_yiq)


def _blur_matrices(sigma, size):
    """Gaussian blur along one axis as a matrix, edges by reflection; the identity for 0: [B] -> [B, size, size]."""
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
    mean = _constant((GREY,), x.device) @ matrices @ x.mean((2, 3, 4))[..., None]  # [B, 1, 1], after the matrix
    y = torch.baddbmm((1 - contrast) * mean, contrast * matrices, x.flatten(2)).view_as(x)
    g = _blur_matrices(params[:, 5], x.shape[-1])[:, None, None]  # [B, 1, 1, S, S], for all: to choose is to wait
    return (g @ y @ g.mT).clamp_(0, 1)  # rows and columns


def normalise_rgb(x):
    """RGB [..., T, S, S, 3] in 0..1 -> [..., 3, T, S, S] by ImageNet's statistics, channels last in memory."""
    return (x - _constant(MEAN, x.device)).div_(_constant(STD, x.device)).movedim(-1, -4)


def normalise_flow(x):
    """Stored flow uint8 [..., T, S, S, 2] -> [..., 2, T, S, S], u and v over 20 px, in -1..1; channels last."""
    return (x.float() - 128).div_(127).movedim(-1, -4)


def weaken_still(x, share):
    """Take a share of what stands still off RGB clips [B, 3, T, S, S], in place: x - a (mean over time - mean over time
    and space), share a [B]. Colour and place of things then say less of which film a clip is from, motion as much."""
    still = x.mean(2, keepdim=True)
    x.sub_(share.view(-1, 1, 1, 1, 1) * (still - still.mean((3, 4), keepdim=True)))


def _augment_in_torch(clips, out):
    """`augment` on whole batches: clips {"rgb": uint8 [B, T, S, S, 3], "flow": [B, T, S, S, 2], "params": [B, 6]} into
    out {"rgb": [B, 3, T, S, S], "flow": [B, 2, T, S, S]}."""
    params = clips["params"]
    flip = params[:, 0].view(-1, 1, 1, 1, 1) > 0
    # colours and u, v as planes [B, C, T, S, S], still 8 bit: contiguous rows for all that follows
    planes = {view: clips[view].movedim(-1, 1).contiguous() for view in out}
    planes = {view: torch.where(flip, x.flip(-1), x) for view, x in planes.items()}
    if "rgb" in out:
        out["rgb"].copy_(normalise_rgb(colour(planes["rgb"].float().div_(255), params).movedim(1, -1)))
    if "flow" in out:
        out["flow"].copy_(normalise_flow(planes["flow"].movedim(1, -1)))
        out["flow"][:, 0] *= 1 - 2 * flip[:, 0].float()


# what becomes of each of the 256 levels, [1, 256, C]; of u mirrored, its negative
RGB_TABLE = ((np.arange(256)[None, :, None] / 255 - MEAN) / STD).astype(np.float32)
FLOW_TABLE = np.repeat((np.arange(256, dtype=np.float32)[None, :, None] - 128) / 127, 2, axis=2)
FLOW_TABLES = {False: FLOW_TABLE, True: FLOW_TABLE * np.float32([-1, 1])}


def _augment_in_8_bits(clips, out):
    """The same on a CPU, several times as fast: OpenCV's vector units on 8 bits and a table for the last step.

    Blur and the colours' matrix commute (both are linear, a blur's weights sum to 1), so blur comes first. Both round
    to whole levels of 255: half a level from the other on average, three at most.
    """
    params = clips["params"]
    contrast, matrices = params[:, 2].numpy(), _colour_matrices(params).numpy()
    for k, (flip, _, _, _, _, sigma) in enumerate(params[:, :6].tolist()):
        # [T S, S, C], one tall picture
        pictures = {view: clips[view][k].flatten(0, 1).numpy() for view in out}
        pictures = {view: cv2.flip(x, 1) if flip else x for view, x in pictures.items()}
        to = {view: x[k].movedim(0, -1).flatten(0, 1).numpy() for view, x in out.items()}
        if "rgb" in out:
            cv2.LUT(_colour_in_8_bits(pictures["rgb"], matrices[k], contrast[k], sigma), RGB_TABLE, dst=to["rgb"])
        if "flow" in out:
            cv2.LUT(pictures["flow"], FLOW_TABLES[flip > 0], dst=to["flow"])


def _colour_in_8_bits(rgb, matrix, contrast, sigma):
    """`colour` of one clip, uint8 [T S, S, 3], by its matrix [3, 3]."""
    size = rgb.shape[1]
    mean = np.dot(GREY, matrix @ cv2.mean(rgb)[:3])
    if sigma:
        rgb = np.stack([cv2.GaussianBlur(frame, (0, 0), sigma, borderType=cv2.BORDER_REFLECT_101)
                        for frame in rgb.reshape(-1, size, size, 3)]).reshape(rgb.shape)
    return cv2.transform(rgb, np.hstack([contrast * matrix, np.full((3, 1), (1 - contrast) * mean)]))


def augment(batch, device):
    """A collated batch of TrainClips -> the clips that model.TwoView takes, on `device`.

    -> [{"rgb": float32 [m, v, 3, T, S, S], "flow": [m, v, 2, T, S, S]}, ...] for long and short clips, of the views
    that the batch has. Flow gets no colour operation; a flip mirrors both views and negates u.
    """
    out = []
    for kind in ("long", "short"):
        if kind not in batch:
            continue
        clips = {k: t.to(device, non_blocking=True).flatten(0, 1) for k, t in batch[kind].items()}
        made = {view: torch.empty(clips[view].movedim(-1, 1).shape, dtype=torch.float32, device=device,
                                  memory_format=torch.channels_last_3d) for view in ("rgb", "flow") if view in clips}
        (_augment_in_8_bits if clips["params"].device.type == "cpu" else _augment_in_torch)(clips, made)
        if "rgb" in made and clips["params"].shape[1] > 6:
            weaken_still(made["rgb"], clips["params"][:, 6])
        out.append({view: x.unflatten(0, batch[kind][view].shape[:2]) for view, x in made.items()})
    return out
