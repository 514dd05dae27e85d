"""Films in containers that OpenCV doesn't write: made with PyAV from frames."""

import io
import os
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np


@contextmanager
def scheduled_as_before():
    """SVT-AV1 makes the thread that calls it one of real time, where it may (as root): all else then stands still."""
    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, priority)


@scheduled_as_before()
def encode(frames, form, codec="libx264", stamps=None, rate=25, gop=12, b_frames=0, pixels="yuv420p", options=(),
           title=None):
    """uint8 frames [H, W, 3] -> a file's bytes. stamps: times in ms (default: at `rate`). options: of the codec."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.codec_context.gop_size = pixels, gop
        stream.codec_context.max_b_frames, stream.codec_context.thread_count = b_frames, 1
        if title:
            container.metadata["title"] = title
        if codec == "libx264":
            stream.options = {"x264-params": "scenecut=0"}  # key frames where `gop` says
        stream.options = {**stream.options, **dict(options)}
        if stamps is not None:
            stream.codec_context.time_base = stream.time_base = Fraction(1, 1000)
        for t, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="bgr24")
            picture.pts = t if stamps is None else stamps[t]
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file.getvalue()


def joined(parts, form, codec, pixels="yuv420p"):
    """Frames of several sizes, uint8 [H, W, 3] each list, in one stream -> a file's bytes."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as container:
        stream, at = None, 0
        for frames in parts:
            encoder = av.CodecContext.create(codec, "w")
            encoder.height, encoder.width = frames[0].shape[:2]
            encoder.pix_fmt, encoder.time_base, encoder.framerate = pixels, Fraction(1, 25), 25
            if stream is None:
                stream = container.add_stream(codec, rate=25)
                stream.height, stream.width, stream.pix_fmt = encoder.height, encoder.width, pixels
            for frame in (*frames, None):
                picture = frame if frame is None else av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "bgr24")
                if picture:
                    picture.pts, picture.time_base = at, Fraction(1, 25)
                    at += 1
                for packet in encoder.encode(picture.reformat(format=pixels) if picture else None):
                    packet.stream = stream
                    container.mux(packet)
    return file.getvalue()


def cut_by_copy(source, path, first):
    """Cut `source` (MP4) at frame `first` without encoding: the frames from the last key frame on are in the file, and
    an edit list hides those before the cut."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        shift = round(first / stream.average_rate / stream.time_base)
        kept = []
        for packet in old.demux(stream):
            if packet.size:
                if packet.is_keyframe and packet.pts <= shift:
                    kept = []
                kept.append(packet)
        for packet in kept:
            packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
            new.mux(packet)
    return path
