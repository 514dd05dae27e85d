"""One video from file to store: decoding, grey, flow, 8 bit, JPEG; its RGB from the same pass.

A process does all of a video (`extract_in_worker`): as many at once as there are cores, nothing waits for
anything. flow_gpu.py computes the flow of many videos at once.

With --segment a long video becomes several files, cut while it is decoded (`segments`): each holds the flow of so many
pairs, and the pair across a cut belongs to the earlier file. The frame at the cut is the last of one file of RGB and
the first of the next, so each segment is a video like any other, with a frame more than flow fields.
"""

import itertools
import os
import sys
from contextlib import suppress
from typing import NamedTuple

import cv2
import numpy as np
import torch

from support.avi import AviReader, AviWriter
from support.errors import BadInput
from support.flow_methods import fields
from support.stores import quantise, segment_file, shrink
from support.videos import cut_short, declared_frames, decode, file_stat

DEFAULT_FPS = 25.0  # frames a second of folders of images, and where a container declares none or an absurd one
LONG_FRAMES = 18_000  # ten minutes at 30 frames a second: a video of more is reported where there is no --segment


class Job(NamedTuple):
    path: str
    flow: str | None  # file to write; None where that is there already. Of a long video: that with @FIRSTFRAME
    rgb: str | None
    part: tuple = (0, 1)  # (i, n): of the segments each n-th, from the i-th on; n processes share one video


class Settings(NamedTuple):
    flow: dict  # of flow_methods.make_settings, with "segment" (seconds) and "fps" where they were asked for
    rgb: dict | None = None  # of stores.rgb_settings
    limit: int | None = None  # frames of each video, for an estimate

    @property
    def fps(self):
        return self.flow.get("fps", 0)

    @property
    def cuts(self):
        """Whether long videos are cut into segments."""
        return "segment" in self.flow

    def segment_pairs(self, source_fps):
        """Pairs of a segment."""
        return max(1, round(self.flow["segment"] * (self.fps or source_fps))) if self.cuts else sys.maxsize


# ---------------------------------------------------------------------------------------------------------------------
# Frames
# ---------------------------------------------------------------------------------------------------------------------
def declared_fps(path):
    """Frames a second that the container declares, or DEFAULT_FPS."""
    fps = 0.0
    if os.path.isfile(path):
        fps = cv2.VideoCapture(os.path.abspath(path), cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FPS)
    return fps if 1 <= fps <= 240 else DEFAULT_FPS


def frames_of(path, about, limit=None, fps=0):
    """Yield the frames of a video, uint8 [H, W, 3] BGR; with `fps` so many a second, by time stamps.

    about: a dict that is filled with the size and rate of the frames, how many the file declares, and how many came so
    far. Raises BadInput as `decode`, and if there is one frame only or the file can't be read to its end.
    """
    # of each file too: clips are decoded at the rate that their flow was made at (support.frames.read_frames)
    about |= {"source": os.path.basename(path), "source_frames": 0, **({"fps": fps} if fps else {})}
    for frame in itertools.islice(decode(path, fps), limit):
        if about["source_frames"] == 0:
            h, w = frame.shape[:2]
            about |= {"source_size": [w, h], "source_fps": declared_fps(path), "source_bytes": file_stat(path)[0],
                      "source_declared": declared_frames(path, fps)}
        about["source_frames"] += 1
        yield frame
    if about["source_frames"] == 1:
        raise BadInput(f"{path} has one frame only{f' at --fps {fps:g}' if fps else ''}; flow needs two")
    # is it the file, or its disk? then there is more of it another day
    if limit is None and cut_short_message(path, about) and os.path.isfile(path):
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


# ---------------------------------------------------------------------------------------------------------------------
# Segments
# ---------------------------------------------------------------------------------------------------------------------
class Ahead:
    """Frames as they come, and whether another follows."""

    def __init__(self, frames):
        self.frames = frames
        self.current, self.following = next(frames), next(frames, None)

    def step(self):
        self.current, self.following = self.following, next(self.frames, None)

    @property
    def final(self):
        return self.following is None


class Segment:
    """Consecutive frames of a video, one file in each store: the whole video, or so many pairs of a long one."""

    def __init__(self, job, about, ahead, first, pairs):
        self.job, self.about, self.ahead = job, about, ahead
        self.first, self.pairs, self.count = first, pairs, 0  # count: of its frames, as they come
        self.flow = self.rgb = self.there = False  # which files are to be made; whether they are there already

    def choose(self, number):
        """Decide which files are to be made, the segment being the `number`-th of its video."""
        i, n = self.job.part
        if number % n == i:
            self.flow, self.rgb = (bool(file) and not is_made(segment_file(file, self.first), self.about, self.first,
                                                              self.pairs + extra)
                                   for file, extra in ((self.job.flow, 0), (self.job.rgb, 1)))
            self.there = not (self.flow or self.rgb)

    def frames(self):
        """Yield its frames, uint8 [H, W, 3] BGR, one more than pairs."""
        self.count = 1
        yield self.ahead.current
        while not self.ahead.final and self.count <= self.pairs:
            self.ahead.step()
            self.count += 1
            yield self.ahead.current

    def outputs(self):
        """-> (file of flow, file of RGB, None where not to be made; their header), once its frames came. The header's
        source_frames are those up to its end."""
        header = {**self.about, "source_frames": self.first + self.count}
        files = [file if wanted else None for file, wanted in ((self.job.flow, self.flow), (self.job.rgb, self.rgb))]
        if self.first or not self.ahead.final:
            files = [file and segment_file(file, self.first) for file in files]
            header |= {"first_frame": self.first, "final": self.ahead.final}
        return *files, header


def is_made(path, about, first, count):
    """Whether the file of a segment is there, whole and of this video: `count` frames, or fewer of the last one."""
    with suppress(BadInput, OSError):
        reader = AviReader(path)
        reader.check()
        header = reader.header
        return (header.get("first_frame") == first and header.get("source_bytes") == about["source_bytes"]
                and (len(reader) == count or header.get("final", False)))
    return False


def segments(job, settings, about):
    """Yield the segments of a video; the frames of each must be used up before the next is asked for."""
    ahead = Ahead(frames_of(job.path, about, settings.limit, settings.fps))
    pairs = settings.segment_pairs(about["source_fps"])
    for number, first in enumerate(itertools.count(0, pairs)):
        segment = Segment(job, about, ahead, first, pairs)
        segment.choose(number)
        yield segment
        if ahead.final:
            return


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
class Count:
    """Pairs that a job will have, as far as its header and what came so far report."""

    def __init__(self, job):
        self.parts, self.there = job.part[1], 0  # pairs that an earlier run made

    def expected(self, about):
        return max(0, (max(about["source_frames"], about["source_declared"]) - 1) // self.parts - self.there)


def grey_frames(segment, settings, rgb_sizes):
    """Yield the grey frames of a segment, or None for each where its flow is not to be made; when they end, its RGB is
    written, if that is to be made.

    rgb_sizes: a list that gets the bytes of each RGB frame. Raises BadInput as `frames_of`, or if the RGB can't be
    written.
    """
    writer = AviWriter(settings.rgb["quality"]) if segment.rgb else None
    for frame in segment.frames():
        if writer:
            rgb_sizes.append(writer.add(shrink(frame, settings.rgb["short_side"])))
        yield grey(frame, settings.flow["short_side"]) if segment.flow else None
    if writer:
        _, path, header = segment.outputs()
        writer.write(path, header)


def extract_video(job, settings, report=None):
    """Write what `job` wants of one video (the formats: stores.py) -> the header of its files, a dict.

    report(pairs of this message, pairs expected of the job, bytes of flow, bytes of RGB): called as they come.
    Raises BadInput, naming the file, if it can't be read, has one frame only, or the output can't be written.
    """
    about, rgb_sizes, count = {}, [], Count(job)

    def done(pairs, size):
        if report:
            report(pairs, count.expected(about), size, sum(rgb_sizes))
        rgb_sizes.clear()

    for segment in segments(job, settings, about):
        frames = grey_frames(segment, settings, rgb_sizes)
        if segment.flow:
            writer = AviWriter(settings.flow["quality"])
            for field in fields(frames, settings.flow):  # [h, w, 2]
                done(1, writer.add(quantise(np.concatenate([field[..., 0], field[..., 1]]))))  # [2h, w]
            path, _, header = segment.outputs()
            writer.write(path, {**header, "device": "cpu"})
        else:
            for k, _ in enumerate(frames):
                if k:
                    done(int(segment.rgb), 0)
        count.there += segment.there * (segment.count - 1)
    return about


def cut_short_message(path, about):
    """`videos.cut_short` of a video whose last file has the header `about`."""
    return cut_short(path, about["source_frames"], about["source_declared"])


def long_message(path, frames):
    """A message if a video of so many frames is one sample though it is long, else None."""
    if frames <= LONG_FRAMES:
        return None
    return (f"{path} is long: its {frames} frames are one sample of training. --segment 60 with a new --out makes one "
            f"of each minute, and its memory doesn't grow with the length")


def extract_in_worker(job, settings, report):
    """Work of `worker_pool.run_in_processes`: all of one video -> the header of its files."""
    torch.set_num_threads(1)
    return extract_video(job, settings, report)
