"""Films whose motion is known, and flow.py on them."""

from pathlib import Path

import cv2
import numpy as np
import pytest

import flow
import goca
from support import flow_methods, flow_pipeline

QUICK = ["--short-side", "0", "--workers", "2"]


def texture(h, w, seed=0):
    noise = np.random.default_rng(seed).normal(size=(h, w)).astype(np.float32)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)


def moving(n, h, w, u, v, seed=0):
    """n grey frames of a texture that moves by (u, v) px a frame; the camera looks at another part of it."""
    room = 8 * n
    big = texture(h + 2 * room, w + 2 * room, seed)
    return [big[room - v * t:room - v * t + h, room - u * t:room - u * t + w] for t in range(n)]


def film(path, frames, codec="FFV1"):
    """A video file; FFV1 is lossless."""
    path.parent.mkdir(parents=True, exist_ok=True)
    h, w = frames[0].shape
    video = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*codec), 25, (w, h))
    assert video.isOpened()
    for frame in frames:
        video.write(cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR))
    video.release()


def make_set(root, n=3, frames=4, size=24):
    for k in range(n):
        film(root / "a" / f"v{k}.avi", moving(frames, size, size, 1, k % 2, seed=k))
    return root


def extract(path, out, **settings):
    """The flow of one video -> its header."""
    settings = flow_pipeline.Settings(flow_methods.make_settings(**settings))
    return flow_pipeline.extract_video(flow_pipeline.Job(path, out, None), settings)


def tree(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in Path(root).rglob("*") if p.is_file()}


def command(videos, out, *more):
    return flow.main(["--videos", str(videos), "--out", str(out), *QUICK, *more])


built = pytest.mark.skipif(goca._goca is None, reason=f"the extension isn't built: {goca.BUILD}")
