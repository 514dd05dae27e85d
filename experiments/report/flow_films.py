"""Optical flow drawn over its film: what the flow network sees, for a page (experiments/report.py).

Colour says where a point moves, its strength how far; arrows say the same without colour. The film is shown in grey.
"""

import base64
import os
import random
from pathlib import Path

import cv2
import numpy as np

from support.errors import BadInput
from support.flow_pipeline import declared_fps
from support.previews import FRAMES, digest, frame_numbers, save_strip, state_of
from support.stores import dequantise
from support.videos import find_videos, frames_at

SIDE = 192  # px, the longer side of what is drawn
LIMIT = 18_000  # bytes of a loop, of which there are few
STEP = 16  # px between two arrows


def colours(flow):
    """Flow [..., 2] -> uint8 BGR [..., 3], its direction as a hue: right red, down green, left cyan, up violet."""
    degrees = np.rad2deg(np.arctan2(flow[..., 1], flow[..., 0])) % 360
    hsv = np.stack([degrees / 2, np.full_like(degrees, 255), np.full_like(degrees, 255)], axis=-1)
    return cv2.cvtColor(hsv.astype(np.uint8).reshape(-1, 1, 3), cv2.COLOR_HSV2BGR).reshape(hsv.shape)


def drawn(frame, flow, full):
    """A frame uint8 BGR [H, W, 3] and its flow [h, w, 2] in px -> uint8 BGR, SIDE px long. full: the length, in px,
    that has full colour."""
    scale = SIDE / max(frame.shape[:2])
    size = [max(2, round(n * scale)) for n in frame.shape[1::-1]]
    grey = cv2.cvtColor(cv2.resize(frame, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC),
                        cv2.COLOR_BGR2GRAY)
    flow = cv2.resize(flow, size, interpolation=cv2.INTER_LINEAR)
    strength = np.minimum(1, np.hypot(flow[..., 0], flow[..., 1]) / full)
    film = 0.75 * grey[..., None].repeat(3, axis=2)
    out = (film + (0.25 * film + 0.6 * colours(flow) - film) * strength[..., None]).astype(np.uint8)
    for y in range(STEP // 2, size[1], STEP):
        for x in range(STEP // 2, size[0], STEP):
            if strength[y, x] > 0.2:
                tip = np.rint((x, y) + flow[y, x] / full * STEP * 0.8).astype(int)
                cv2.arrowedLine(out, (x, y), tip.tolist(), (255, 255, 255), 1, cv2.LINE_AA, tipLength=0.4)
    return out


def wheel(size=96):
    """What the colours mean, as the address of a picture: still in the middle, as far as it goes at the rim."""
    y, x = np.mgrid[-1:1:size * 1j, -1:1:size * 1j].astype(np.float32)
    length = np.hypot(x, y)
    field = np.stack([x, y], axis=-1)
    colour = 90 + (0.6 * colours(field) + 22 - 90) * np.minimum(1, length)[..., None]
    alpha = 255 * np.clip((1 - length) * size / 2, 0, 1)
    _, data = cv2.imencode(".png", np.dstack([colour, alpha]).astype(np.uint8))
    return "data:image/png;base64," + base64.b64encode(data).decode()


def flow_strip(name, path, store, folder):
    """Write the loop of a film's flow into a folder of previews -> Strip. name: in the store; path: of the film.
    Raises BadInput, naming the file, where one can't be read."""
    cut = store.segments(name)
    first = int(cut[0].rpartition("@")[2]) if cut else 0
    reader, fps = store.open(cut[0] if cut else name), store.header.get("fps", 0)
    numbers, step = frame_numbers(0, len(reader), fps or declared_fps(path))
    frames = dict(frames_at(path, sorted({first + t for t in numbers}), fps))
    if len(frames) < len(set(numbers)):
        raise BadInput(f"{path} has fewer frames than its flow in {store.root}; make that anew with flow.py")
    flows = [dequantise(plane).reshape(2, -1, plane.shape[1]).transpose(1, 2, 0) for plane in reader.read(numbers)]
    full = max(0.5, float(np.percentile(np.hypot(*np.stack(flows).transpose(3, 0, 1, 2)), 99)))
    pictures = [drawn(frames[first + t], flow, full) for t, flow in zip(numbers, flows, strict=True)]
    stem = f"flow-{digest(path, store.root)}-{digest(state_of(path), state_of(reader.path))}"
    return save_strip(folder, stem, pictures, step * FRAMES, LIMIT)


def name_in_store(path, videos):
    """What a film below the folder `videos` is called in a store."""
    name = os.path.relpath(path, videos)
    return name if os.path.isdir(path) else os.path.splitext(name)[0]


def some_films(store, videos, many, seed=0):
    """Films below `videos` of which the store holds flow, `many` of them by chance -> [(name, path)]."""
    found = sorted(find_videos(videos).items())
    random.Random(seed).shuffle(found)
    held = ((name, path) for name, path in found if name in store or store.segments(name))
    return sorted(pair for pair, _ in zip(held, range(many), strict=False))


def forget_others(folder, strips):
    """Remove loops of flow that a page no longer shows."""
    kept = {strip.file for strip in strips}
    for file in Path(folder).glob("flow-*.webp"):
        if file.name not in kept:
            file.unlink(missing_ok=True)
