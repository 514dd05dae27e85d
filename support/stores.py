"""The stores of flow and of RGB that flow.py fills: a folder with header.json (settings) and one .avi a video.

A frame of flow is u over v, [2h, w], one grey JPEG: JPEG and most codecs halve the chroma, so u and v are never
colours. `quantise` and `dequantise` are its 8 bits.
"""

import json
import os
import re
import time
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch

from support.avi import AviReader
from support.errors import BadInput
from support.files import atomic, check_folder

BOUND = 20.0  # px; flow is clipped to [-BOUND, BOUND] (paper: "pre-processed as in [12,37,80]")


def quantise(flow):
    """Flow [..., 2] in px -> uint8; 128 is exactly 0, so a flipped u is exactly 256 - u. Step 20/127 = 0.157 px."""
    return np.clip(np.rint(flow * (127 / BOUND)) + 128, 1, 255).astype(np.uint8)


def quantise_on_device(flow):
    """`quantise` of flow [P, 2, h, w] in px, a tensor on any device -> u over v, uint8 [P, 2h, w]."""
    return torch.clamp((flow * (127 / BOUND)).round() + 128, 1, 255).to(torch.uint8).flatten(1, 2)


def dequantise(planes):
    """The inverse: uint8 -> float32 px."""
    return (planes.astype(np.float32) - 128) * (BOUND / 127)


def rgb_settings(short_side=190, quality=90):
    """The settings that determine the bytes of an RGB store -> dict for its header. 190 px: the largest frame that
    S3D's crops see."""
    return {"short_side": short_side, "resize": "area to shrink; smaller frames stay as they are", "quality": quality,
            "opencv": cv2.__version__}


def shrink(frame, short_side):
    """A frame as an RGB store keeps it: uint8 [H, W, 3] -> [h, w, 3] with min(h, w) = `short_side`, if that is less."""
    h, w = frame.shape[:2]
    scale = short_side / min(h, w)
    if scale >= 1:
        return frame
    return cv2.resize(frame, (round(w * scale), round(h * scale)), interpolation=cv2.INTER_AREA)


SEGMENT = re.compile(r"(.+)@(\d+)\.avi", re.DOTALL)  # file of a segment: name of its video, first frame


def segment_file(path, first):
    """The file of a long video's segment that begins with frame `first`, where `path` is that of a short video."""
    return f"{os.fspath(path)[:-len('.avi')]}@{first}.avi"


class Store:
    """A folder with header.json (settings) and <video name>.avi; of a long video that was cut (flow.py --segment),
    <video name>@<first frame>.avi of each segment. Raises BadInput, with the command that makes it, if
    `root` holds no store of this kind and version."""

    KIND, VERSION, COMMAND = "", 1, ""

    def __init__(self, root):
        self.root, self._segments = Path(root), {}
        self.command = self.COMMAND.format(root=root)
        try:
            self.header = json.loads((self.root / "header.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise BadInput(f"{root} is no {self.KIND} store (no header.json in it); make one with: "
                           f"{self.command}") from None
        except (OSError, ValueError) as e:
            raise BadInput(f"{self.root / 'header.json'} is damaged ({e}); it was written by: {self.command}") from e
        kind, version = (self.header.get(k) for k in ("kind", "version")) if isinstance(self.header, dict) else (0, 0)
        if (kind, version) != (self.KIND, self.VERSION):
            raise BadInput(f"{root} holds {kind} version {version}, but {self.KIND} version {self.VERSION} is needed; "
                           f"make it in an empty folder with: {self.command}")

    def path(self, name):
        return self.root / f"{name}.avi"

    def __contains__(self, name):
        return os.path.isfile(self.path(name))

    def films(self):
        """{name: a file of it} of the videos that the store holds, sorted; one in segments is one video."""
        found = {}
        for folder, _, files in os.walk(self.root, followlinks=True):
            for file in sorted(files):
                if file.endswith(".avi") and not file.startswith("."):
                    cut = self.header.get("segment") and SEGMENT.fullmatch(file)
                    name = os.path.relpath(os.path.join(folder, cut[1] if cut else file[:-len(".avi")]), self.root)
                    found.setdefault(name, os.path.join(folder, file))
        return dict(sorted(found.items()))

    def segments(self, name):
        """Names of the segments of a video, in order, as they were when this store was first asked for one in that
        folder; [] where it isn't cut."""
        if not self.header.get("segment"):  # x@10.avi is then the film x@10
            return []
        folder = os.path.dirname(name)
        if folder not in self._segments:
            found = self._segments[folder] = defaultdict(list)
            with suppress(OSError), os.scandir(self.root / folder) as entries:
                for entry in entries:
                    if match := SEGMENT.fullmatch(entry.name):
                        found[match[1]].append(int(match[2]))
        firsts = self._segments[folder].get(os.path.basename(name), ())
        return [f"{name}@{first}" for first in sorted(firsts)]

    def frames_of(self, name):
        """Frames of the film that the segment `name` is of; None where its last segment isn't there."""
        *_, last = self.segments(SEGMENT.fullmatch(f"{name}.avi")[1]) or [name]
        header = self.open(last).header
        return header["source_frames"] if header.get("final") else None

    def open(self, name):
        """One video, or one segment -> AviReader."""
        try:
            return AviReader(self.path(name), self.command)
        except FileNotFoundError:
            if cut := self.segments(name):
                shown = ", ".join([*cut[:3], *["..."] * (len(cut) > 3)])
                raise BadInput(f"{self.root} holds {name} in {len(cut)} segments; name one of them: {shown}") from None
            raise BadInput(f"{self.root} has no {self.KIND} of {name}; run again: {self.command}") from None


class FlowStore(Store):
    """The folder that flow.py fills; of a video of n frames the n-1 planes [2h, w], u over v."""

    KIND, COMMAND = "flow", "python flow.py --videos DIR --out {root}"


class RgbStore(Store):
    """The folder that flow.py --rgb fills; of a video of n frames all n in BGR [h, w, 3], short side as the header says
    (`rgb_settings`, `shrink`). Each file's header holds source, source_bytes and source_frames as that of its flow."""

    KIND, COMMAND = "rgb", "python flow.py --videos DIR --out FLOW --rgb {root}"


def open_store(kind, root, settings, option="--out"):
    """Make the folder of a store with its header, or hold `settings` to the header that is there -> the store.

    kind: FlowStore or RgbStore. Raises BadInput if the folder holds something else or was made with other
    settings.
    """
    root, header = Path(root), {"kind": kind.KIND, "version": kind.VERSION, **settings}
    try:
        inside = [p.name for p in root.iterdir() if not p.name.startswith(".tmp-")]
    except FileNotFoundError:
        inside = []
    except OSError as e:
        raise BadInput(f"{option} {root} can't be used as a folder ({e.strerror}); choose another") from e
    if not inside:  # of shards that start together one writes the header, and the others are held to it
        check_folder(root, option)
        with suppress(FileExistsError), atomic(root / "header.json", exclusive=True) as tmp:
            tmp.write_text(json.dumps(header, indent=1) + "\n")
    elif not os.path.lexists(root / "header.json"):
        raise BadInput(f"{option} {root} is not empty and no {kind.KIND} store ({inside[0]} is in it, header.json "
                       f"is not); choose a new or empty folder")
    until = time.monotonic() + 10  # on a file system without hard links another shard's is empty for a moment
    with suppress(OSError):  # then the store has a message
        while (root / "header.json").stat().st_size == 0 and time.monotonic() < until:
            time.sleep(0.05)
    store = kind(root)
    keys = {**header, **store.header}
    if store.header.get("method") != header.get("method"):
        keys = ["method"]  # all else differs then too
    differing = [f"{key} is {store.header.get(key)} there and {header.get(key)} now"
                 for key in keys if store.header.get(key) != header.get(key)]
    if differing:
        raise BadInput(f"{root} was made with other settings ({', '.join(differing)}); use those or another "
                       f"{option}")
    _remove_old_temporaries(root)
    return store


def write_list(path, content):
    """Write a store's list of messages, {kind: {name: message}}; without any there is no file. A list that stands as
    it should isn't touched: a finished store may be where nothing can be written."""
    text = json.dumps(content, indent=1) + "\n" if any(content.values()) else None
    with suppress(OSError, ValueError):
        if path.read_text() == text:
            return
    if text:
        with atomic(path) as tmp:
            tmp.write_text(text)
    elif os.path.lexists(path):
        try:
            path.unlink()
        except OSError as e:
            raise BadInput(f"{path} is outdated and can't be removed ({e.strerror}); remove it, or run again where it "
                           f"can be written") from e


def _remove_old_temporaries(root):
    """Remove what killed runs left; what is a day old, because other shards may be writing theirs."""
    with suppress(OSError):
        for tmp in root.rglob(".tmp-*"):
            with suppress(OSError):
                if time.time() - tmp.stat().st_mtime > 86400:
                    tmp.unlink()
