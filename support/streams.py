"""What a container tells about its video stream that OpenCV keeps to itself, read with PyAV: which frames are shown,
when, and whether they change their size on the way."""

from contextlib import contextmanager, suppress
from fractions import Fraction

import av

UNKNOWN_RATE = 25  # frames a second where a stream says nothing


def lenient(version):
    """Arguments of av.open by which tags that aren't UTF-8 don't keep a film from being read: since PyAV 19 they never
    do, and it takes no such argument."""
    return {"metadata_errors": "replace"} if int(version.split(".")[0]) < 19 else {}


OPEN = lenient(av.__version__)


@contextmanager
def open_stream(path):
    """The first video stream of a file -> (container, stream), or (None, None) where PyAV finds none."""
    try:
        container = av.open(f"file:{path}", **OPEN)
    except (av.FFmpegError, ValueError):
        yield None, None
        return
    with container:
        if not container.streams.video:
            yield None, None
            return
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        yield container, stream


def hidden_frames(path):
    """Frames that a container holds but does not show: those before the cut of a clip made by stream copy, which stand
    there for the decoder alone (edit list of MP4 and MOV)."""
    with open_stream(path) as (_, stream):
        if stream is None or not stream.frames:
            return 0
        shown = sum(not entry.is_discard for entry in stream.index_entries)
        return max(0, stream.frames - shown) if any(e.is_discard for e in stream.index_entries) else 0


def size_change(path):
    """((w, h), (w', h'), second) if a stream changes its size on the way, as joined recordings do, else None.

    Only key frames are decoded: a size begins with one.
    """
    with open_stream(path) as (container, stream):
        if stream is None:
            return None
        stream.codec_context.skip_frame = "NONKEY"
        first = None
        with suppress(av.FFmpegError, ValueError):  # a damaged file: what decodes is for `decode` to say
            for frame in container.decode(stream):
                first = first or (frame.width, frame.height)
                if (frame.width, frame.height) != first:
                    return first, (frame.width, frame.height), frame.time or 0.0
    return None


def frame_times(path):
    """Times of the frames that a file shows, in seconds (Fractions, ascending), and the duration of the last.

    From the packets' time stamps, without decoding. Packets before the first key frame give no frame. Where time starts
    again, as in joined recordings, it goes on.
    """
    packets, started = [], False
    with open_stream(path) as (container, stream):
        if stream is None:
            return [], Fraction(1, UNKNOWN_RATE)
        rate, tick = Fraction(stream.average_rate or stream.guessed_rate or UNKNOWN_RATE), stream.time_base
        with suppress(av.FFmpegError, ValueError):
            for packet in container.demux(stream):
                started = started or packet.is_keyframe
                if packet.size and started and not packet.is_discard:
                    packets.append((packet.pts, packet.dts, packet.duration or 0))
    known = [column for column in (0, 1) if all(p[column] is not None for p in packets)]
    if not known:  # neither presentation nor decoding times: a bare stream
        return [k / rate for k in range(len(packets))], 1 / rate
    pieces = [[]]
    for before, packet in zip([None, *packets], packets, strict=False):
        if before and None not in (before[1], packet[1]) and packet[1] < before[1]:
            pieces.append([])
        pieces[-1].append((packet[known[0]], packet[2] or 1 / rate / tick))
    times, end = [], 0
    for piece in map(sorted, filter(None, pieces)):
        times += [end + (stamp - piece[0][0]) * tick for stamp, _ in piece]
        end = times[-1] + piece[-1][1] * tick
    return times, end - times[-1] if times else 1 / rate
