"""One video from file to store: decoding, grey, flow, 8 bit, JPEG; its RGB from the same pass.

A process does all of a video (`extract_in_worker`): as many at once as there are cores, nothing waits for
anything. flow_gpu.py computes the flow of many videos at once.
"""

import itertools
import os
from typing import NamedTuple

import cv2
import numpy as np
import torch

from support.avi import AviWriter
from support.errors import BadInput
from support.flow_methods import fields
from support.stores import quantise, shrink
from support.videos import cut_short, declared_frames, decode, file_stat


class Job(NamedTuple):
    path: str
    flow: str | None  # file to write; None where that is there already
    rgb: str | None


class Settings(NamedTuple):
    flow: dict  # of flow_methods.make_settings
    rgb: dict | None = None  # of stores.rgb_settings
    limit: int | None = None  # frames of each video, for an estimate


def frames_of(path, about, limit=None):
    """Yield the frames of a video, uint8 [H, W, 3] BGR.

    about: a dict that is filled with the size of the frames, how many the file declares, and how many came so far.
    Raises BadInput, naming the file, if it can't be read, to its end if it seems cut short, changes its size or has one
    frame only.
    """
    about |= {"source": os.path.basename(path), "source_frames": 0}
    for frame in itertools.islice(decode(path), limit):
        h, w = frame.shape[:2]
        if about["source_frames"] == 0:
            about["source_size"] = [w, h]
            about["source_declared"] = declared_frames(path)
        about["source_frames"] += 1
        yield frame
    if about["source_frames"] == 1:
        raise BadInput(f"{path} has one frame only; flow needs two")
    about["source_bytes"] = file_stat(path)[0]
    # is it the file, or its disk? then there is more of it another day
    if limit is None and os.path.isfile(path) and cut_short_message(path, about):
        try:
            with open(path, "rb") as f:
                while f.read(2**20):
                    pass
        except OSError as e:
            raise BadInput(f"{path} can't be read to its end ({e.strerror}); see whether its disk is "
                           f"well") from None


def grey(frame, short_side):
    """A frame as the methods take it: uint8 [H, W, 3] BGR -> [h, w], min(h, w) = `short_side` px (0: as it is)."""
    frame = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
    h, w = frame.shape
    scale = short_side / min(h, w) if short_side else 1
    if scale == 1:
        return frame
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return cv2.resize(frame, (round(w * scale), round(h * scale)), interpolation=how)


def grey_frames(job, settings, about, rgb_sizes):
    """Yield the grey frames of a video; when they end, its RGB is written, if `job` wants it.

    rgb_sizes: a list that gets the bytes of each RGB frame. Raises BadInput as `frames_of`, or if the RGB can't be
    written.
    """
    writer = AviWriter(settings.rgb["quality"]) if job.rgb else None
    for frame in frames_of(job.path, about, settings.limit):
        if writer:
            rgb_sizes.append(writer.add(shrink(frame, settings.rgb["short_side"])))
        yield grey(frame, settings.flow["short_side"])
    if writer:
        writer.write(job.rgb, about)


def extract_video(job, settings, report=None):
    """Write what `job` wants of one video (the formats: stores.py) -> the header of its files, a dict.

    report(pairs of this message, pairs expected of the video, bytes of flow, bytes of RGB): called as they come.
    Raises BadInput, naming the file, if it can't be read, has one frame only, or the output can't be written.
    """
    about, rgb_sizes, writer = {}, [], AviWriter(settings.flow["quality"])
    frames = grey_frames(job, settings, about, rgb_sizes)

    def done(size):
        if report:
            report(1, expected_pairs(about), size, rgb_sizes[-1] if rgb_sizes else 0)

    if job.flow:
        for field in fields(frames, settings.flow):  # [h, w, 2]
            done(writer.add(quantise(np.concatenate([field[..., 0], field[..., 1]]))))  # [2h, w]
        writer.write(job.flow, {**about, "device": "cpu"})
    else:
        next(frames)
        for _ in frames:
            done(0)
    return about


def expected_pairs(about):
    """Pairs that a video will have, as far as its header and what came so far report."""
    return max(about["source_frames"], about["source_declared"]) - 1


def cut_short_message(path, about):
    """`videos.cut_short` of a video whose files have the header `about`."""
    return cut_short(path, about["source_frames"], about["source_declared"])


def extract_in_worker(job, settings, report):
    """Work of `worker_pool.run_in_processes`: all of one video -> its `cut_short_message`."""
    torch.set_num_threads(1)
    about = extract_video(job, settings, report)
    return cut_short_message(job.path, about) if settings.limit is None else None
