"""Frames far into a film without decoding all before them: from a key frame on, with PyAV.

Only where that is exact. Nothing may look behind the key frame: an IDR picture of H.264 or HEVC, a key frame of VP8,
VP9 or AV1. Its number must be known: of a stream without a time that starts again, the packets shown before it. Where
frames depend on an open group's (recovery points, CRA), decoding begins at an IDR picture further back, or not here.
"""

from bisect import bisect_right
from contextlib import suppress
from functools import lru_cache
from itertools import chain, pairwise
from typing import NamedTuple

import av
import cv2

from support import streams

FAR = 100  # frames that are decoded rather than passed over: opening a film for seeking costs as much
TRIES = 8  # key frames looked at
IDR = {"h264": lambda byte: byte & 31 == 5, "hevc": lambda byte: byte >> 1 & 63 in (19, 20)}
SLICES = {"h264": lambda byte: 1 <= byte & 31 <= 5, "hevc": lambda byte: byte >> 1 & 63 < 32}
CLOSED = {"vp8", "vp9", "av1"}  # whose key frames forget all before them
# the codecs' names in OpenCV
FOURCC = {int.from_bytes(name, "little") for name in (b"h264", b"hevc", b"VP80", b"VP90", b"AV01")}
# whose colours PyAV gives as OpenCV does, bit by bit
PIXELS = {"yuv420p", "yuvj420p", "yuv422p", "yuv444p"}
TURNS = {90: cv2.ROTATE_90_COUNTERCLOCKWISE, -90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, -180: cv2.ROTATE_180}


class KeyFrame(NamedTuple):
    number: int  # of the first frame that decodes from here
    stamp: int  # of its packet
    seek: tuple  # times to seek to: between it and the next, where an index leads to it; else that of the one before


class KeyFrames(NamedTuple):
    frames: int  # of the film, by its packets
    at: list  # of KeyFrame, ascending; empty where there is no seeking
    stamp: str  # "dts" or "pts"


NONE = KeyFrames(0, [], "")


@lru_cache(maxsize=256)
def key_frames(path, stat):
    """The key frames of a film. stat: of its file, `videos.file_stat`: another is another film."""
    with streams.open_stream(path) as (container, stream):
        context = stream and stream.codec_context
        if not context or context.codec.canonical_name not in (*IDR, *CLOSED) or context.pix_fmt not in PIXELS:
            return NONE
        # MP4's index holds every packet, unless it comes in fragments; others' are read to the end
        if "mp4" in container.format.name and stream.frames:
            stamp = "dts"
            packets = [(e.timestamp, e.timestamp, e.is_keyframe, e.is_discard) for e in stream.index_entries]
        else:
            stamp, packets = "pts", []
            with suppress(av.FFmpegError, ValueError):
                packets += ((p.pts, p.dts, p.is_keyframe, p.is_discard) for p in container.demux(stream) if p.size)
    decoded = [dts for _, dts, *_ in packets if dts is not None]
    if any(at is None for at, *_ in packets) or any(a >= b for a, b in pairwise(decoded)):  # or time starts again
        return NONE
    shown, at = 0, []  # (number, stamp)
    for time, _, is_key, is_discard in packets:
        if is_key:
            at.append((shown, time))
        shown += not is_discard
    times = [at[0][1], *(time for _, time in at), packets[-1][0]] if at else []
    return KeyFrames(shown, [KeyFrame(number, time, ((time + after) // 2, before)) for (number, time), before, after
                             in zip(at, times, times[2:], strict=False)], stamp)


def nal_headers(data, codec, extradata):
    """The first bytes of the NAL units of a packet of H.264 or HEVC."""
    if extradata[:1] == b"\1":  # avcC, hvcC (MP4, Matroska): each unit follows its length
        size, at = (extradata[4 if codec == "h264" else 21] & 3) + 1, 0
        while at + size < len(data):
            yield data[at + size]
            at += size + int.from_bytes(data[at:at + size], "big")
    else:  # start codes (MPEG-TS)
        yield from (unit[0] for unit in data.split(b"\0\0\1")[1:] if unit)


def forgets(packet):
    """Whether nothing after a key frame, its packet, looks behind it."""
    codec = packet.stream.codec_context.codec.canonical_name
    if codec in CLOSED:
        return True
    headers = nal_headers(bytes(packet), codec, packet.stream.codec_context.extradata or b"")
    first_slice = next((byte for byte in headers if SLICES[codec](byte)), None)
    return first_slice is not None and IDR[codec](first_slice)


class SeekingDecoder:
    """Decodes a film from a key frame on; the methods are those of cv2.VideoCapture. As there a damaged place is the
    film's end."""

    def __init__(self, path, stat):
        self.known, self.opened, self.frame = key_frames(path, stat), streams.open_stream(path), None
        self.container, self.stream = self.opened.__enter__()

    def start(self, behind, number):
        """Go to the last key frame behind frame `behind` that is not beyond frame `number` -> the number of the frame
        that comes next; None where there is none."""
        at = self.known.at
        for key in at[:bisect_right(at, number, key=lambda key: key.number)][:-TRIES - 1:-1]:
            if key.number <= behind:
                return None
            if (packet := self._packet(key)) is not None:
                following = self.container.demux(self.stream)
                self.frames = (f for p in chain([packet], following) for f in self.stream.codec_context.decode(p))
                return key.number
        return None

    def _packet(self, key):
        """The packet of a key frame, if nothing after it looks behind it."""
        for time in key.seek:
            self.container.seek(time, stream=self.stream)
            for packet in self.container.demux(self.stream):
                if getattr(packet, self.known.stamp) == key.stamp:
                    return packet if packet.is_keyframe and forgets(packet) else None
                if packet.dts is not None and packet.dts > key.stamp:
                    break
        return None

    def grab(self):
        self.frame = None
        with suppress(av.FFmpegError):
            self.frame = next(self.frames, None)
        return self.frame is not None

    def retrieve(self):
        """-> (True, uint8 [H, W, 3] BGR), turned as OpenCV turns them."""
        image = self.frame.to_ndarray(format="bgr24")
        turn = TURNS.get(self.frame.rotation)
        return True, image if turn is None else cv2.rotate(image, turn)

    def release(self):
        self.opened.__exit__(None, None, None)
