"""Films whose frames carry their number, and batches of clips."""

import cv2
import numpy as np
import torch


def film(path, frames, fps=25):
    """Write uint8 frames [H, W, 3] as a nearly lossless video."""
    path.parent.mkdir(parents=True, exist_ok=True)
    h, w = frames[0].shape[:2]
    out = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), fps, (w, h))
    for frame in frames:
        out.write(frame)
    out.release()
    return path


def numbered(n, h=24, w=32):
    """Frames whose grey value tells their number: 5 t."""
    return [np.full((h, w, 3), 5 * t, np.uint8) for t in range(n)]


def values(clip):
    """Frame numbers of a clip of `numbered` frames: uint8 [T, S, S, 3] -> list."""
    return [round(t.float().mean().item() / 5) for t in clip]


NEUTRAL = [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]  # flip, brightness, contrast, saturation, hue, sigma


def batch_of(params, size=16):
    g = torch.Generator().manual_seed(0)
    rgb = torch.randint(0, 256, (1, len(params), 3, size, size, 3), generator=g, dtype=torch.uint8)
    flow = torch.randint(1, 256, (1, len(params), 3, size, size, 2), generator=g, dtype=torch.uint8)
    return {"long": {"rgb": rgb, "flow": flow, "params": torch.tensor([params])}}
