"""Motion-JPEG AVI, the files of the flow and RGB stores.

Players show them, and any frame is one seek away. OpenCV's own writer garbles odd widths and its reader takes 8 times
as long, hence these few lines of RIFF.
"""

import functools
import json
import struct
import zlib
from contextlib import suppress

import cv2
import numpy as np

from support.errors import BadInput
from support.files import atomic


def _chunk(name, payload):
    return name + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)


class AviWriter:
    """Collects frames as JPEGs, so that one pass over a video can fill several files; `write` makes the file."""

    def __init__(self, quality=95):
        self.quality, self.size, self.jpegs = quality, None, []

    def add(self, plane):
        """One more frame, uint8 [H, W] grey or [H, W, 3] BGR, all of one shape -> bytes that it takes."""
        self.size = self.size or plane.shape
        self.jpegs.append(cv2.imencode(".jpg", plane, [cv2.IMWRITE_JPEG_QUALITY, self.quality])[1].tobytes())
        return len(self.jpegs[-1])

    def write(self, path, header, fps=25):
        """The file, with `header` (a dict) as its comment. Raises BadInput if it can't be written or is empty."""
        if not self.jpegs:
            raise BadInput(f"{path} would hold no frame; nothing was written")
        (h, w), colour, n = self.size[:2], len(self.size) == 3, len(self.jpegs)
        # AVIMAINHEADER, AVISTREAMHEADER and BITMAPINFOHEADER of the RIFF/AVI specification
        avih = struct.pack("<14I", round(1e6 / fps), 0, 0, 0x10, n, 0, 1, 0, w, h, 0, 0, 0, 0)
        strh = struct.pack("<4s4sIHHIIIIIIII4H", b"vids", b"MJPG", 0, 0, 0, 0, 1000, round(1000 * fps), 0, n, 0,
                           0xFFFFFFFF, 0, 0, 0, w, h)
        strf = struct.pack("<IiiHH4sIiiII", 40, w, h, 1, 24, b"MJPG", w * h * 3, 0, 0, 0, 0)
        strl = b"strl" + _chunk(b"strh", strh) + _chunk(b"strf", strf)
        crc = functools.reduce(lambda so_far, jpeg: zlib.crc32(jpeg, so_far), self.jpegs, 0)
        about = {**header, "frames": n, "crc32": crc, **({"colour": True} if colour else {})}
        lists = (_chunk(b"LIST", b"hdrl" + _chunk(b"avih", avih) + _chunk(b"LIST", strl))
                 + _chunk(b"LIST", b"INFO" + _chunk(b"ICMT", json.dumps(about).encode())))
        sizes = np.array([len(jpeg) for jpeg in self.jpegs], np.int64)
        held = 8 + sizes + sizes % 2  # a chunk: name, size, payload, padding
        index = np.zeros((n, 4), "<u4")
        index[:, 0] = np.frombuffer(b"00dc", "<u4")
        index[:, 1], index[:, 2], index[:, 3] = 0x10, 4 + np.cumsum(held) - held, sizes
        movi, whole = 4 + int(held.sum()), 4 + len(lists) + 8 + 4 + int(held.sum()) + 8 + index.nbytes
        if whole >= 2 ** 32:
            raise BadInput(f"{path} would pass the 4 GB of an AVI file; cut the video into shorter ones (flow.py "
                           f"--segment 60)")
        with atomic(path) as tmp, open(tmp, "wb") as f:
            f.write(b"RIFF" + struct.pack("<I", whole) + b"AVI " + lists + b"LIST" + struct.pack("<I", movi) + b"movi")
            f.writelines(_chunk(b"00dc", jpeg) for jpeg in self.jpegs)
            f.write(_chunk(b"idx1", index.tobytes()))


def write_avi(path, planes, header, fps=25, quality=95):
    """Write planes, an iterable of uint8 [H, W] grey or [H, W, 3] BGR, as motion JPEG with `header` (a dict) as the
    file's comment; `header` is looked into after the last plane. Raises BadInput if it can't be written."""
    writer = AviWriter(quality)
    for plane in planes:
        writer.add(plane)
    writer.write(path, header, fps)


class AviReader:
    """Random access to a file of `write_avi`. Raises BadInput, naming the file and the command, where it is damaged."""

    def __init__(self, path, command="python flow.py --videos DIR --out FLOW"):
        self.path, self.command = path, command
        try:
            with open(path, "rb") as f:
                head = f.read(4096)
                lists, at = {}, 12
                while at + 12 <= len(head) and b"movi" not in lists:  # the three LISTs, then movi's index
                    tag, size, kind = struct.unpack_from("<4sI4s", head, at)
                    if tag != b"LIST":
                        raise ValueError("no LIST where one belongs")
                    lists[kind] = (at + 8, size)
                    at += 8 + size + size % 2
                start, _ = lists[b"INFO"]
                size = struct.unpack_from("<I", head, start + 8)[0]
                self.header = json.loads(head[start + 12:start + 12 + size])
                f.seek(at)
                tag, size = struct.unpack("<4sI", f.read(8))
                if tag != b"idx1" or size != 16 * self.header["frames"]:
                    raise ValueError("its index is cut off")
                index = np.frombuffer(f.read(size), dtype="<u4").reshape(-1, 4)
                self._at = index[:, 2].astype(np.int64) + lists[b"movi"][0] + 8
                self._size = index[:, 3]
                start, _ = lists[b"hdrl"]
                self.shape = struct.unpack_from("<II", head, start + 44)[::-1]  # (H, W), from avih
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, TypeError, struct.error) as e:
            raise BadInput(f"{path} is damaged ({e}); {self._cure()}") from e
        self._flag = cv2.IMREAD_COLOR if self.header.get("colour") else cv2.IMREAD_GRAYSCALE

    def _cure(self):
        return f"remove it and run again: {self.command}"

    def __len__(self):
        return len(self._at)

    def frames(self, indices):
        """Yield frames `indices` one after the other: uint8 [H, W], or [H, W, 3] BGR."""
        try:
            with open(self.path, "rb") as f:
                for t in indices:
                    f.seek(self._at[t])
                    jpeg, plane = np.frombuffer(f.read(self._size[t]), np.uint8), None
                    with suppress(cv2.error):  # nothing there, or a size beyond all measure
                        plane = cv2.imdecode(jpeg, self._flag)
                    if plane is None or plane.shape[:2] != self.shape:
                        raise BadInput(f"{self.path} is damaged at frame {t}; {self._cure()}")
                    yield plane
        except OSError as e:  # it was there when it was opened
            raise BadInput(f"{self.path} can no longer be read ({e.strerror}); see whether its disk is well") from e

    def check(self, whole=False):
        """Raise BadInput where a frame is not where the index says: chunk, size, first bytes of a JPEG. `whole`: where
        one doesn't decode either, or all together are not what was written (older files have no checksum)."""
        crc = 0
        try:
            with open(self.path, "rb", buffering=0) as f:  # of some bytes of each frame a buffer would read all
                for t, (at, size) in enumerate(zip(self._at, self._size, strict=True)):
                    f.seek(max(0, at - 8))
                    head = f.read(8 + (int(size) if whole else 2))
                    if head[:10] != b"00dc" + struct.pack("<I", size) + b"\xff\xd8":
                        raise BadInput(f"{self.path} is damaged at frame {t}; {self._cure()}")
                    crc = zlib.crc32(head[8:], crc)
        except OSError as e:
            raise BadInput(f"{self.path} can't be read ({e.strerror}); see whether its disk is well") from e
        if whole:
            for _ in self.frames(range(len(self))):
                pass
            if crc != self.header.get("crc32", crc):
                raise BadInput(f"{self.path} is damaged (its checksum is another); {self._cure()}")

    def read(self, indices):
        """Frames `indices` as a list; a frame asked for twice is decoded once."""
        ascending = sorted(set(indices))
        planes = dict(zip(ascending, self.frames(ascending), strict=True))
        return [planes[t] for t in indices]
