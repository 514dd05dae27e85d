"""The files that one stage hands the next: how they are written, and how they are checked when loaded.

flow store     a folder: header.json (settings), one motion-JPEG .avi a video      flow.py -> pretrain.py, evaluate.py
RGB store      likewise, the frames at training size (optional)                    flow.py --rgb -> pretrain.py
prototypes     .npz with a JSON header (`save_arrays`)                             prototypes.py -> pretrain.py
features       .npz likewise                                                       evaluate.py
checkpoint     .pt of tensors and plain values (checkpoints.py)                    pretrain.py -> evaluate.py

Each is versioned, written to a temporary name and renamed, and loaded without executing anything. data.py passes all
names of this file and of checkpoints.py on: stages say `data.FlowStore`.
"""

import argparse
import functools
import json
import os
import struct
import sys
import tempfile
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np


# ---------------------------------------------------------------------------------------------------------------------
# Stage files: what one stage hands the next
# ---------------------------------------------------------------------------------------------------------------------
class BadInput(ValueError):
    """Something the user can mend. Stages print it as one sentence and leave with status 2."""

    status = 2
    said = False  # by another process, so this one need not


class Unreadable(BadInput):
    """A file that may be well, and which another start may be able to read: status 75."""

    status = os.EX_TEMPFAIL


def command_line(main):
    """Run a stage's `main` and leave with its status; BadInput is one sentence and its status, Ctrl-C is 130, an output
    that nobody reads any more, as of `| head`, 141."""
    try:
        status = main()
        print(end="", flush=True)
        sys.exit(status)
    except BrokenPipeError:
        _mute()
        sys.exit(141)
    except BadInput as e:
        if not e.said:
            print(f"error: {e}", file=sys.stderr)
        sys.exit(e.status)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        sys.exit(130)


class Help(argparse.HelpFormatter):
    """Help of a command: each flag with its default where it has one and its text names none."""

    def add_argument(self, action):
        value = action.default
        has = not (value is None or value is False or value in ("", [], argparse.SUPPRESS))
        if has and "default" not in (action.help or ""):
            shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
            said = f"default: {shown.replace('%', '%%')}"
            action.help = f"{action.help} ({said})" if action.help else said
        super().add_argument(action)


def _mute():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end goes there too


def say(*lines, end="\n"):
    """Print lines at once, names that are no Unicode too; where nobody reads them any more, as after `| head -1`, the
    work goes on without."""
    try:
        print(*(line.encode(errors="backslashreplace").decode() for line in lines), sep="\n", end=end, flush=True)
    except BrokenPipeError:
        _mute()


@contextmanager
def atomic(path, exclusive=False):
    """Yield a temporary path beside `path`; it becomes `path` when the block ends well and vanishes otherwise.

    exclusive: raise FileExistsError where `path` stands already, in place of replacing it.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=".tmp-", suffix=path.suffix, dir=path.parent)
    except OSError as e:
        raise BadInput(f"{path} can't be written ({e.strerror}); choose a folder that can") from e
    os.close(fd)
    try:
        yield Path(name)
        with open(name, "rb") as f:
            os.fsync(f.fileno())
        umask = os.umask(0)
        os.umask(umask)
        with suppress(PermissionError):  # a file system without rights of its own
            os.chmod(name, 0o666 & ~umask)
        (_link if exclusive else os.replace)(name, path)
    except FileExistsError:
        raise
    except OSError as e:
        raise BadInput(f"{path} could not be written ({e.strerror}); what stood there before is untouched") from e
    finally:
        Path(name).unlink(missing_ok=True)


def _link(source, path):
    """os.link; where there are no hard links, `path` is claimed by an empty file that the other then replaces."""
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
        os.replace(source, path)


def check_writable(path, option):
    """Before long work: raise BadInput if it could not write its result, the file `path` of `option`, in the end."""
    path = Path(path)
    if path.is_dir():
        raise BadInput(f"{option} {path} is a folder; give the name of a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as e:
        raise BadInput(f"{option} {path} can't be written ({e.strerror}); choose a folder that can") from e


def save_arrays(path, kind, header, **arrays):
    """Write arrays and a JSON header to one .npz file.

    path: the file, any suffix. kind: what it holds ("prototypes", "features"). header: JSON-able settings.
    """
    header = {"kind": kind, "version": 1, **header}
    with atomic(path) as tmp, open(tmp, "wb") as f:
        np.savez(f, header=np.array(json.dumps(header)), **arrays)


def load_arrays(path, kind, made_by):
    """Read what `save_arrays` wrote -> (header, {name: array}); nothing in the file is executed.

    Raises BadInput, with the command that makes the file, where it is missing, damaged or of another kind.
    """
    if not Path(path).is_file():
        raise BadInput(f"{path} doesn't exist; make it with: {made_by}")
    try:
        with np.load(path, allow_pickle=False) as f:
            arrays = {k: f[k] for k in f.files}
        header = json.loads(str(arrays.pop("header")))
    except Exception as e:  # numpy, zipfile and json each have their own words for a damaged file
        raise BadInput(f"{path} is damaged or no {kind} file ({e}); make it with: {made_by}") from e
    if header.get("kind") != kind or header.get("version") != 1:
        raise BadInput(f"{path} holds {header.get('kind')} version {header.get('version')}, but {kind} version 1 is "
                       f"needed; make it with: {made_by}")
    return header, arrays


# ---------------------------------------------------------------------------------------------------------------------
# The stores of flow and of RGB: one folder, one .avi a video
# ---------------------------------------------------------------------------------------------------------------------
# A frame of flow is u over v, [2h, w], one grey JPEG: JPEG and most codecs halve the chroma, so u and v are never
# colours. The container is plain motion-JPEG AVI, which players show and which gives any frame by one seek. OpenCV's
# own writer garbles odd widths and its reader takes 8 times as long, hence the few lines of RIFF below.
BOUND = 20.0  # px; flow is clipped to [-BOUND, BOUND] (paper: "pre-processed as in [12,37,80]")


def quantise(flow):
    """Flow [..., 2] in px -> uint8; 128 is exactly 0, so a flipped u is exactly 256 - u. Step 20/127 = 0.157 px."""
    return np.clip(np.rint(flow * (127 / BOUND)) + 128, 1, 255).astype(np.uint8)


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
            raise BadInput(f"{path} would pass the 4 GB of an AVI file; cut the video into shorter ones")
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
