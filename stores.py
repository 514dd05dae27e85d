"""The files that one stage hands the next: how they are written, and how they are checked when loaded.

flow store     a folder: header.json (settings), one motion-JPEG .avi a video      flow.py -> pretrain.py, evaluate.py
prototypes     .npz with a JSON header (`save_arrays`)                             prototypes.py -> pretrain.py
features       .npz likewise                                                       evaluate.py
checkpoint     .pt of tensors and plain values (`save_checkpoint`)                 pretrain.py -> evaluate.py

Each is versioned, written to a temporary name and renamed, and loaded without executing anything. data.py passes all
names of this file on: stages say `data.FlowStore`.
"""

import json
import os
import shutil
import struct
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch


# ---------------------------------------------------------------------------------------------------------------------
# Stage files: what one stage hands the next
# ---------------------------------------------------------------------------------------------------------------------
class BadInput(ValueError):
    """Something the user can mend. Stages print it as one sentence and leave with status 2."""


def command_line(main):
    """Run a stage's `main` and leave with its status; BadInput is one sentence and 2, Ctrl-C is 130."""
    try:
        sys.exit(main())
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues", file=sys.stderr)
        sys.exit(130)


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
        os.chmod(name, 0o666 & ~umask)
        (os.link if exclusive else os.replace)(name, path)
    except FileExistsError:
        raise
    except OSError as e:
        raise BadInput(f"{path} could not be written ({e.strerror}); what stood there before is untouched") from e
    finally:
        Path(name).unlink(missing_ok=True)


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


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values; what stood at `path` stays whole until the new file is."""
    with atomic(path) as tmp, open(tmp, "wb") as f:  # a file of Python's: torch's own don't say why a write failed
        try:
            torch.save({"kind": "checkpoint", "version": 1, **state}, f)
        except RuntimeError as e:  # torch, as it closes a file that could not be written
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def load_checkpoint(path):
    """Read a checkpoint, given its file or the folder of its run, onto the CPU.

    Raises BadInput where it is missing, damaged, of another version, or holds anything but tensors and plain values
    (torch.load(weights_only=True): a pickle that would run code is refused).
    """
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise BadInput(f"{file} doesn't exist; pretrain.py writes it: give its --out folder, or a file from there")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch, zipfile and pickle each have their own words
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise BadInput(f"{file} is damaged or no checkpoint of this project ({why})") from e
    if not isinstance(state, dict) or state.get("kind") != "checkpoint" or state.get("version") != 1:
        raise BadInput(f"{file} is no checkpoint of this project (version 1)")
    return state


def save_run(out, state, keep):
    """Write RUN/checkpoint.pt; the `keep` - 1 before it are checkpoint.1.pt (the newest), checkpoint.2.pt, ...

    At any moment, and where the disk is full, one before is there whole.
    """
    new, files = out / "checkpoint.new.pt", [out / "checkpoint.pt"]
    files += [out / f"checkpoint.{k}.pt" for k in range(1, keep)]
    try:
        save_checkpoint(new, state)
    except BadInput as e:
        kept = f"{files[0]} is the one before: make room, and the same command continues"
        raise BadInput(f"step {state['step']} could not be saved: {e}; "
                       f"{kept if files[0].exists() else 'nothing had been saved before'}") from e
    for older, newer in reversed(list(zip(files[1:], files, strict=False))):
        if newer.exists():
            older.unlink(missing_ok=True)
            try:
                os.link(newer, older)  # checkpoint.pt stands until the new one replaces it
            except OSError:  # a file system without hard links
                shutil.copyfile(newer, older)
    os.replace(new, files[0])


def last_checkpoint(out):
    """The newest checkpoint of a run that can be read, or None. A damaged one is named and the one before is taken.

    Raises BadInput if all that are there are damaged.
    """
    older = [p for p in out.glob("checkpoint.*.pt") if p.suffixes[0][1:].isdigit()]
    files = [out / "checkpoint.pt", *sorted(older, key=lambda p: int(p.suffixes[0][1:]))]
    files = [f for f in files if f.exists()]
    for file in files:
        try:
            return load_checkpoint(file)
        except BadInput as e:
            if file == files[-1]:
                raise
            print(f"warning: {e}; taking the checkpoint before it", file=sys.stderr)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# The flow store: one folder, one .avi a video
# ---------------------------------------------------------------------------------------------------------------------
# A frame is u over v, [2h, w], one grey JPEG: JPEG and most codecs halve the chroma, so u and v are never colours. The
# container is plain motion-JPEG AVI, which players show and which gives any frame by one seek. OpenCV's own writer
# garbles odd widths and its reader takes 8 times as long, hence the few lines of RIFF below.
BOUND = 20.0  # px; flow is clipped to [-BOUND, BOUND] (paper: "pre-processed as in [12,37,80]")


def quantise(flow):
    """Flow [..., 2] in px -> uint8; 128 is exactly 0, so a flipped u is exactly 256 - u. Step 20/127 = 0.157 px."""
    return np.clip(np.rint(flow * (127 / BOUND)) + 128, 1, 255).astype(np.uint8)


def dequantise(planes):
    """The inverse: uint8 -> float32 px."""
    return (planes.astype(np.float32) - 128) * (BOUND / 127)


def _chunk(name, payload):
    return name + struct.pack("<I", len(payload)) + payload + b"\0" * (len(payload) % 2)


def write_avi(path, planes, header, fps=25, quality=95):
    """Write grey planes, an iterable of uint8 [H, W], as motion JPEG with `header` (a dict) as the file's comment."""
    jpegs, size = [], None
    for plane in planes:
        if size is None:
            size = plane.shape
        jpegs.append(cv2.imencode(".jpg", plane, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes())
    h, w = size
    # AVIMAINHEADER, AVISTREAMHEADER and BITMAPINFOHEADER of the RIFF/AVI specification
    avih = struct.pack("<14I", round(1e6 / fps), 0, 0, 0x10, len(jpegs), 0, 1, 0, w, h, 0, 0, 0, 0)
    strh = struct.pack("<4s4sIHHIIIIIIII4H", b"vids", b"MJPG", 0, 0, 0, 0, 1000, round(1000 * fps), 0, len(jpegs), 0,
                       0xFFFFFFFF, 0, 0, 0, w, h)
    strf = struct.pack("<IiiHH4sIiiII", 40, w, h, 1, 24, b"MJPG", w * h * 3, 0, 0, 0, 0)
    strl = b"strl" + _chunk(b"strh", strh) + _chunk(b"strf", strf)
    hdrl = b"hdrl" + _chunk(b"avih", avih) + _chunk(b"LIST", strl)
    info = b"INFO" + _chunk(b"ICMT", json.dumps({**header, "frames": len(jpegs)}).encode())
    movi, index = [b"movi"], []
    at = 4
    for jpeg in jpegs:
        index.append(struct.pack("<4sIII", b"00dc", 0x10, at, len(jpeg)))
        movi.append(_chunk(b"00dc", jpeg))
        at += len(movi[-1])
    body = (b"AVI " + _chunk(b"LIST", hdrl) + _chunk(b"LIST", info) + _chunk(b"LIST", b"".join(movi))
            + _chunk(b"idx1", b"".join(index)))
    with atomic(path) as tmp:
        tmp.write_bytes(_chunk(b"RIFF", body))


class AviReader:
    """Random access to a file of `write_avi`. Raises BadInput, naming the file, where it is damaged."""

    def __init__(self, path):
        self.path = path
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
        except FileNotFoundError:
            raise
        except (OSError, ValueError, KeyError, struct.error) as e:
            raise BadInput(f"{path} is damaged ({e}); remove it and run flow.py again") from e

    def __len__(self):
        return len(self._at)

    def read(self, indices):
        """Frames `indices` -> list of uint8 [H, W]; a frame asked for twice is decoded once."""
        planes = {}
        with open(self.path, "rb") as f:
            for t in sorted(set(indices)):
                f.seek(self._at[t])
                plane = cv2.imdecode(np.frombuffer(f.read(self._size[t]), np.uint8), cv2.IMREAD_GRAYSCALE)
                if plane is None:
                    raise BadInput(f"{self.path} is damaged at frame {t}; remove it and run flow.py again")
                planes[t] = plane
        return [planes[t] for t in indices]


class FlowStore:
    """The folder that flow.py fills: header.json (settings) and <video name>.avi, u over v.

    Raises BadInput if `root` is no flow store of this version.
    """

    def __init__(self, root):
        self.root = Path(root)
        try:
            self.header = json.loads((self.root / "header.json").read_text())
        except FileNotFoundError:
            raise BadInput(f"{root} is no flow store (no header.json in it); make one with: "
                           f"python flow.py --videos DIR --out {root}") from None
        except ValueError as e:
            raise BadInput(f"{self.root / 'header.json'} is damaged ({e}); it was written by flow.py") from e
        if self.header.get("kind") != "flow" or self.header.get("version") != 1:
            raise BadInput(f"{root} holds {self.header.get('kind')} version {self.header.get('version')}, but flow "
                           f"version 1 is needed; make it with flow.py in an empty folder")

    def path(self, name):
        return self.root / f"{name}.avi"

    def __contains__(self, name):
        return self.path(name).is_file()

    def open(self, name):
        """The flow of one video -> AviReader of its n-1 planes [2h, w]."""
        try:
            return AviReader(self.path(name))
        except FileNotFoundError:
            raise BadInput(f"{self.root} has no flow of {name}; run flow.py again") from None
