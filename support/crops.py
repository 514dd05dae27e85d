"""Squares cut out of the frames of a film and of their flow, and resized: the pixels of clips."""

from collections import defaultdict
from typing import NamedTuple

import cv2
import numpy as np
import torch


class Box(NamedTuple):
    """A square of a frame in fractions: side of the short side, x and y of the room that is left."""
    side: float
    x: float
    y: float


def square(box, h, w):
    """A box in the pixels of an h x w frame: (y, x, side)."""
    side = max(1, round(min(h, w) * box.side))
    return round((h - side) * box.y), round((w - side) * box.x), side


def cut(frame, box, size):
    """Cut a square out of a frame and resize it: uint8 [H, W, ...] -> [size, size, ...]."""
    y, x, side = square(box, *frame.shape[:2])
    how = cv2.INTER_AREA if side >= 2 * size else cv2.INTER_LINEAR  # below, bilinear misses nothing and is fast
    return cv2.resize(frame[y:y + side, x:x + side], (size, size), interpolation=how)


def cut_same_region(plane, box, size, h, w):
    """Cut out of a plane [h', w'] of any resolution what `cut` takes out of an h x w frame of the same film.

    The frame's square falls between the plane's pixels; its place is kept to a fraction of a pixel, or to half a pixel
    of the plane where it shrinks to half or less.
    """
    y, x, side = square(box, h, w)
    down, right = plane.shape[0] / h, plane.shape[1] / w
    if down == right == 1:
        return cut(plane, box, size)
    if side * down >= 2 * size:
        piece = plane[round(y * down):round((y + side) * down), round(x * right):round((x + side) * right)]
        return cv2.resize(piece, (size, size), interpolation=cv2.INTER_AREA)
    dy, dx = side * down / size, side * right / size  # a pixel of the clip, in the plane's; pixels are at their centres
    at = np.array([[dx, 0, x * right + (dx - 1) / 2], [0, dy, y * down + (dy - 1) / 2]])
    return cv2.warpAffine(plane, at, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                          borderMode=cv2.BORDER_REPLICATE)


def cut_clips(frames, groups, size, views=("rgb", "flow"), shape=None):
    """Cut clips out of frames as they come -> {group: {"rgb": uint8 [v, T, S, S, 3], "flow": uint8 [v, T, S, S, 2]}}.

    frames: of `read_frames`. groups: {group: [(frame indices, Box), ...]}, the clips of a group of one length. shape:
    (H, W) of the film's frames, needed where only their flow comes. Colour order and u, v are sorted after the cut,
    where frames are small.
    """
    out, uses = {}, defaultdict(list)
    for group, clips in groups.items():
        clip = len(clips), len(clips[0][0]), size, size
        out[group] = {view: np.empty((*clip, 3 if view == "rgb" else 2), np.uint8) for view in views}
        for k, (indices, box) in enumerate(clips):
            for i, t in enumerate(indices):
                uses[t].append((box, {view: x[k, i] for view, x in out[group].items()}))
    for t, frame, planes in frames:
        for box, to in uses[t]:
            if "rgb" in views:
                cv2.cvtColor(cut(frame, box, size), cv2.COLOR_BGR2RGB, dst=to["rgb"])
            if "flow" in views:
                u_v = planes[:len(planes) // 2], planes[len(planes) // 2:]
                h, w = shape or frame.shape[:2]
                cv2.merge([cut_same_region(plane, box, size, h, w) for plane in u_v], dst=to["flow"])
    return {group: {view: torch.from_numpy(x) for view, x in by_view.items()} for group, by_view in out.items()}
