"""Moving previews: eight frames of a film side by side in one small WebP, which a page plays as a loop.

In   films, or pieces of them: (path, start, end) in seconds.
Out  FOLDER/<piece>-<state of its file>-<width>x<height>-<milliseconds>.webp, 11 KB at most. The name says what the
     page needs, so a preview is kept while its film is unchanged, and stays when the film is gone.

The frames lie at most 0.15 s apart, round the middle of the piece: what moves is seen to move, at its own speed.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from support.errors import BadInput
from support.files import atomic
from support.flow_pipeline import declared_fps
from support.videos import decode, file_stat, film_length, frames_at
from support.worker_pool import cores, run_in_processes

FRAMES = 8
SPAN = 1.2  # seconds that a loop lasts at most
LATEST = 120  # seconds: a longer film is shown as it is here, since decoding starts at its beginning
LIMIT = 11_000  # bytes a preview: 1,000 films, with three views of 1024 dimensions, stay below 20 MB
NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}-\d+x\d+-\d+\.webp")
# longer side in px and quality: the first that stays within LIMIT
SETTINGS = ((192, 60), (192, 45), (192, 30), (144, 30), (96, 20), (64, 10))


class Strip(NamedTuple):
    file: str  # its name in the folder of previews
    width: int  # of one frame
    height: int
    seconds: float  # that the loop lasts


class Preview(NamedTuple):
    strip: Strip | None
    problem: str  # why the film could not be read, or ""


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------
def digest(*parts):
    return hashlib.sha1(b"\0".join(os.fsencode(str(p)) for p in parts), usedforsecurity=False).hexdigest()[:16]


def state_of(path):
    """What changes with a film's content; None where it is gone."""
    try:
        return digest(*file_stat(path))
    except OSError:
        return None


def _strip(file):
    """What the name of a preview says."""
    size, ms = Path(file).stem.split("-")[2:]
    width, height = size.split("x")
    return Strip(file, int(width), int(height), int(ms) / 1000)


def _previews(folder):
    return sorted(file for file in os.listdir(folder) if NAME.fullmatch(file))


# ---------------------------------------------------------------------------------------------------------------------
# One film
# ---------------------------------------------------------------------------------------------------------------------
def frame_numbers(first, last, fps):
    """Eight ascending frame numbers round the middle of first..last-1 and the seconds from one to the next."""
    last = max(last, first + 1)
    step = max(1.0, min((last - first) / FRAMES, SPAN * fps / FRAMES))
    middle = min((first + last) / 2, first + LATEST * fps)
    numbers = np.clip(np.floor(middle + step * (np.arange(FRAMES) - FRAMES / 2 + 0.5)), first, last - 1)
    return numbers.astype(int).tolist(), step / fps


def encode(frames, limit=LIMIT):
    """Frames uint8 [H, W, 3] of one size -> (WebP of all side by side, width, height of one), within `limit` bytes."""
    h, w = frames[0].shape[:2]
    for side, quality in SETTINGS:
        scale = min(1, side / max(h, w))
        size = [max(2, 2 * round(scale * n / 2)) for n in (w, h)]  # even: chroma has half the resolution
        small = np.hstack([cv2.resize(f, size, interpolation=cv2.INTER_AREA) for f in frames])
        ok, data = cv2.imencode(".webp", small, [cv2.IMWRITE_WEBP_QUALITY, quality])
        if not ok:
            raise BadInput("this OpenCV writes no WebP; install opencv-contrib-python from PyPI")
        if len(data) <= limit:
            break
    return data.tobytes(), *size


def save_strip(folder, stem, frames, seconds, limit=LIMIT):
    """Write eight frames uint8 [H, W, 3] as a loop of `seconds` into a folder of previews -> Strip."""
    data, width, height = encode(frames, limit)
    file = f"{stem}-{width}x{height}-{round(1000 * seconds)}.webp"
    with atomic(Path(folder) / file) as tmp:
        tmp.write_bytes(data)
    return Strip(file, width, height, round(1000 * seconds) / 1000)


def _read(path, wanted):
    """The frames `wanted` of a film -> {number: frame no larger than a preview needs}, those that decode."""
    def small(frame):
        scale = min(1, SETTINGS[0][0] / max(frame.shape[:2]))
        return cv2.resize(frame, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else frame
    return {t: small(frame) for t, frame in frames_at(path, sorted(wanted))}


def strips_of(job, folder, report):
    """Write the previews of one film. job: (path, state, [(piece, start, end)]) -> [(piece, file)].

    Where the container declares more frames than decode, the pieces are cut to those that do. Raises BadInput, naming
    the film, where none do.
    """
    path, state, pieces = job
    count, fps = film_length(path), declared_fps(path)

    def plan(count):
        return [frame_numbers(min(round(start * fps), max(0, count - 1)),
                              min(count, round(end * fps)) if end is not None else count, fps)
                for _, start, end in pieces]

    plans = plan(count)
    try:
        frames = _read(path, {t for numbers, _ in plans for t in numbers})
    except BadInput:
        plans = plan(sum(1 for _ in decode(path)))
        frames = _read(path, {t for numbers, _ in plans for t in numbers})
    made, last = [], max(frames)
    for (piece, _, _), (numbers, step) in zip(pieces, plans, strict=True):
        strip = save_strip(folder, f"{piece}-{state}", [frames[min(t, last)] for t in numbers], step * FRAMES)
        made.append((piece, strip.file))
        report(piece)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------
def make_previews(pieces, folder, workers=None, time_limit=300, progress=False):
    """Make the previews that are lacking, in several processes, and take away those of films no longer asked for.

    pieces: [(path, start, end)], end None: to the film's end. time_limit: seconds that a film may give nothing.
    Returns a Preview each; a film that can't be read keeps the preview that it had, if any.
    Raises BadInput where the folder can't be written, and as `run_in_processes`.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept = {file.split("-")[0]: file for file in _previews(folder)}
    except OSError as e:
        raise BadInput(f"{folder} can't be written ({e.strerror}); choose a folder that can") from e
    states = {path: state_of(path) for path, _, _ in pieces}
    keys = [digest(*piece) for piece in pieces]
    problems = {path: f"{os.fspath(path)} doesn't exist" for path, state in states.items() if state is None}
    jobs = {}
    for key, (path, start, end) in zip(keys, pieces, strict=True):
        if states[path] and kept.get(key, "").split("-")[1:2] != [states[path]]:
            jobs.setdefault(path, (path, states[path], []))[2].append((key, start, end))
    fresh = {}
    workers = min(workers or cores(), len(jobs))
    with tqdm(total=len(jobs), unit="film", desc="previews", disable=not (progress and jobs)) as bar:
        for path, kind, value in run_in_processes(strips_of, jobs, folder, workers, time_limit) if jobs else ():
            if kind != "progress":
                bar.update()
                fresh |= dict(value) if kind == "done" else {}
                problems |= {path: value} if kind != "done" else {}
    found = {**kept, **fresh}
    files = {key: found[key] for key in keys if key in found}
    for file in set(_previews(folder)) - set(files.values()):
        (folder / file).unlink(missing_ok=True)
    return [Preview(_strip(files[key]) if key in files else None, problems.get(path, ""))
            for key, (path, _, _) in zip(keys, pieces, strict=True)]
