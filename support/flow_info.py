"""python flow.py info: what a store of flow or RGB holds, and a picture of a flow field."""

import json
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np

from support.cli import say
from support.errors import BadInput
from support.files import atomic, check_writable
from support.stores import SEGMENT, FlowStore, RgbStore, dequantise
from support.videos import find_videos, frames_at


def colours(flow, top):
    """Flow [H, W, 2] in px -> uint8 [H, W, 3] BGR: hue is direction, white stands still, full colour is `top` px."""
    size, angle = cv2.cartToPolar(flow[..., 0], flow[..., 1], angleInDegrees=True)
    hsv = np.stack([angle / 2, 255 * np.minimum(size / top, 1), np.full_like(size, 255)], axis=-1)
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2BGR)


def picture(store, name, video):
    """The middle flow field of a video, uint8 [H, W, 3] BGR: its frame (if the path `video` is given), flow, wheel; of
    an RGB store the middle frame."""
    reader = store.open(name)
    t = len(reader) // 2
    plane = reader.read([t])[0]
    if store.KIND == "rgb":
        say(f"{name}: frame {t} of {len(reader)}, {plane.shape[1]}x{plane.shape[0]} px")
        return plane
    flow = np.stack(np.split(dequantise(plane), 2), axis=-1)  # [h, w, 2]
    h, w = flow.shape[:2]
    top = max(1.0, float(np.quantile(np.linalg.norm(flow, axis=-1), 0.99)))
    wheel = np.stack(np.meshgrid(*2 * [np.linspace(-top, top, h, dtype=np.float32)]), axis=-1)
    wheel[np.linalg.norm(wheel, axis=-1) > top] = 0
    tiles = [colours(flow, top), colours(wheel, top)]
    if video:
        first, fps = reader.header.get("first_frame", 0), store.header.get("fps", 0)
        frames = [frame for _, frame in frames_at(video, [first + t], fps)]
        tiles = [cv2.resize(frame, (w, h), interpolation=cv2.INTER_AREA) for frame in frames] + tiles
    say(f"{name}: flow {t} of {len(reader)}, {w}x{h} px; full colour is {top:.1f} px or more")
    return np.hstack(tiles).repeat(max(1, 256 // h), axis=0).repeat(max(1, 256 // h), axis=1)


def open_any(root):
    """A store of flow or of RGB, whichever its header says."""
    with suppress(OSError, ValueError, AttributeError):
        if json.loads((Path(root) / "header.json").read_text()).get("kind") == RgbStore.KIND:
            return RgbStore(root)
    return FlowStore(root)


def info(args):
    """Print what a store of flow or RGB holds; draw a flow field."""
    if bool(args.video) != bool(args.picture) or (args.picture and not cv2.haveImageWriter(args.picture)):
        raise BadInput("--video NAME and --picture FILE go together, and FILE ends as a picture does (flow.png)")
    if args.picture:
        check_writable(args.picture, "--picture")
    store = open_any(args.store)
    names = sorted(str(p.relative_to(store.root))[:-4] for p in store.root.rglob("*.avi")
                   if p.name[0] != "." and p.is_file())
    planes, size, magnitudes, damaged, devices = 0, 0, [], [], Counter()
    for k, name in enumerate(names):
        try:
            reader = store.open(name)
            reader.check(args.check)
            planes, size = planes + len(reader), size + os.path.getsize(store.path(name))
            devices[reader.header.get("device", "cpu")] += 1
            if store.KIND == "flow" and k % -(-len(names) // 200) == 0:
                magnitudes.append(np.hypot(*np.split(dequantise(reader.read([len(reader) // 2])[0]), 2)).mean())
        except (BadInput, OSError) as e:
            damaged.append(f"  {e}")
    say(*(f"{key:16} {value}" for key, value in store.header.items()))
    what = "flow fields" if store.KIND == "flow" else "frames"
    videos = {match[1] if (match := SEGMENT.fullmatch(f"{name}.avi")) and store.header.get("segment") else name
              for name in names}
    files = f" in {len(names)} files" if len(videos) < len(names) else ""
    how = "each frame read" if args.check else "by where frames begin; --check reads each"
    say(f"{len(videos)} videos{files}, {planes} {what}, {size / 1e6:.1f} MB, {len(damaged)} damaged ({how})", *damaged)
    if magnitudes:
        by = ", ".join(f"{device} ({count})" for device, count in devices.items())
        say(f"mean magnitude {np.mean(magnitudes):.3f} px (middle fields of {len(magnitudes)} videos); computed "
            f"on {by}")
    found = find_videos(args.videos) if args.videos else {}
    if found:
        missing = [f"  {name}" for name in found if name not in store and not store.segments(name)]
        say(f"{len(missing)} of the {len(found)} videos below {args.videos} have no {store.KIND}", *missing,
            *found.notes())
    if args.picture:
        match = SEGMENT.fullmatch(f"{args.video}.avi")
        video = found.get(args.video) or (match and found.get(match[1]))
        image = cv2.imencode(Path(args.picture).suffix, picture(store, args.video, video))[1]
        with atomic(args.picture) as tmp:
            tmp.write_bytes(image)
    return 0
