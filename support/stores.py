"""The stores of flow and of RGB that flow.py fills: a folder with header.json (settings) and one .avi a video.

A frame of flow is u over v, [2h, w], one grey JPEG: JPEG and most codecs halve the chroma, so u and v are never
colours. `quantise` and `dequantise` are its 8 bits.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import torch

from support.avi import AviReader
from support.errors import BadInput

# A frame of flow is u over v, [2h, w], one grey JPEG: JPEG and most codecs halve the chroma, so u and v are never
# colours. The container is plain motion-JPEG AVI, which players show and which gives any frame by one seek. OpenCV's
# own writer garbles odd widths and its reader takes 8 times as long, hence the few lines of RIFF below.
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
    """What decides the bytes of an RGB store -> dict for its header. 190 px: the largest frame that S3D's crops see."""
    return {"short_side": short_side, "resize": "area to shrink; smaller frames stay as they are", "quality": quality,
            "opencv": cv2.__version__}


def shrink(frame, short_side):
    """A frame as an RGB store keeps it: uint8 [H, W, 3] -> [h, w, 3] with min(h, w) = `short_side`, if that is less."""
    h, w = frame.shape[:2]
    scale = short_side / min(h, w)
    if scale >= 1:
        return frame
    return cv2.resize(frame, (round(w * scale), round(h * scale)), interpolation=cv2.INTER_AREA)


class Store:
    """A folder with header.json (settings) and <video name>.avi. Raises BadInput, with the command that makes it, if
    `root` holds no store of this kind and version."""

    KIND, VERSION, COMMAND = "", 1, ""

    def __init__(self, root):
        self.root = Path(root)
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
        return self.path(name).is_file()

    def open(self, name):
        """One video -> AviReader."""
        try:
            return AviReader(self.path(name), self.command)
        except FileNotFoundError:
            raise BadInput(f"{self.root} has no {self.KIND} of {name}; run again: {self.command}") from None


class FlowStore(Store):
    """The folder that flow.py fills; of a video of n frames the n-1 planes [2h, w], u over v."""

    KIND, COMMAND = "flow", "python flow.py --videos DIR --out {root}"


class RgbStore(Store):
    """The folder that flow.py --rgb fills; of a video of n frames all n in BGR [h, w, 3], short side as the header says
    (`rgb_settings`, `shrink`). Each file's header holds source, source_bytes and source_frames as that of its flow."""

    KIND, COMMAND = "rgb", "python flow.py --videos DIR --out FLOW --rgb {root}"
