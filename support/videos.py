"""Videos, files and folders of images: which there are below a folder, and their frames.

One sequential pass with OpenCV's FFmpeg, since the containers' frame counts and seeks are not to be trusted; far into
a film PyAV begins at a key frame where that is exact (support/seeking.py). What OpenCV does not tell, time stamps and
changes of size, comes from PyAV too (support/streams.py).
"""

import os
import threading
import time
from collections import Counter, defaultdict
from contextlib import suppress
from fractions import Fraction
from functools import cache

import cv2

from support import frame_folders, seeking, streams
from support.errors import BadInput

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read once by OpenCV; our message instead of a codec's
cv2.setNumThreads(1)  # processes are the parallelism; one forked after OpenCV's threads had work would wait for them

# what FFmpeg takes for a list of other files to open, whatever its name: concat, HLS, DASH, SDP
PLAYLISTS = (b"ffconcat", b"#extm3u", b"<?xml", b"<mpd", b"v=0")  # at the start
PLAYLISTS_WITHIN = (b"dash:profile:", b"\nc=in ip")
VIDEO_SUFFIXES = set(""".3g2 .3gp .asf .avi .divx .dv .f4v .flv .gif .ivf .m1v .m2ts .m2v .m4v .mkv .mov .mp4 .mpe .mpeg
                        .mpg .mts .mxf .nut .ogm .ogv .qt .rm .rmvb .ts .vob .webm .wmv .y4m""".split())


def _plain(path):
    """A path that FFmpeg takes for a file: `set:v1/a.mp4` would be a protocol, `-` its standard input."""
    return os.path.abspath(path)


def _open_decoder(path):
    """A decoder at the first frame. Raises BadInput, naming the file, where there is nothing to open."""
    if not os.path.isfile(path):
        raise BadInput(f"{path} doesn't exist")
    if os.path.getsize(path) == 0:
        raise BadInput(f"{path} is empty (zero bytes)")
    if not os.access(path, os.R_OK):
        raise BadInput(f"{path} can't be read; its rights forbid it")
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # OpenCV would crash
        raise BadInput(f"{path} can't be opened: its name is no UTF-8; rename it") from None
    with suppress(OSError), open(path, "rb") as f:  # where it can't be read OpenCV gives no frame
        head = f.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
        if head.startswith(PLAYLISTS) or any(words in head for words in PLAYLISTS_WITHIN):
            raise BadInput(f"{path} is a list of other files, no video")
    level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        # one thread: a decoder that starts one a core spends more time on them than on a short film
        return cv2.VideoCapture(_plain(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    finally:
        cv2.utils.logging.setLogLevel(level)


@cache
def _size_change(path, stat):
    """`streams.size_change`, looked up once a process and film."""
    return streams.size_change(path)


def _refuse_size_change(path):
    """Raise BadInput for a film whose frames change their size: OpenCV would squeeze all into the first one's."""
    if change := _size_change(_plain(path), file_stat(path)):
        (w, h), (w_then, h_then), second = change
        raise BadInput(f"{path} changes its size from {w}x{h} to {w_then}x{h_then} after {second:.2f} s; cut it there "
                       f"into two videos")


def decode(path, fps=0):
    """Yield the frames of a video in one sequential pass, uint8 [H, W, 3], BGR as OpenCV gives them.

    fps: 0 for the frames as stored, or so many a second by their time stamps (`frames_at_rate`).
    Raises BadInput, naming the file, if it can't be opened, has no frame, or its frames change their size. A file cut
    short gives what decodes.
    """
    if not os.path.isdir(path):
        video, n = _open_decoder(path), 0
        _refuse_size_change(path)
    if fps:
        stored = frames_at_rate(path, fps)
        yield from (frame for _, frame in _on_screen(path, range(len(stored)), stored))
        return
    if os.path.isdir(path):
        yield from (frame for _, frame in frame_folders.read_frames(path))
        return
    while True:
        ok, frame = video.read()
        if not ok:
            break
        n += 1
        yield frame
    video.release()
    if n == 0:
        raise BadInput(f"{path} holds no frame that OpenCV can decode; is it a video?")


class FilmReader:
    """Frames of a film for calls that go forward: its pieces, one after the other, cost one pass together. What lies
    far ahead is begun at a key frame (support/seeking.py).

    frames: how many a pass from the start gives, where that is known: where the packets are not as many, none is passed
    over, since the numbers would differ. position: the number of the frame that comes next. Raises BadInput as
    `decode` where there is nothing to open.
    """

    def __init__(self, path, frames=None):
        self.path, self.frames, self.position = path, frames, 0
        self.video = None if os.path.isdir(path) else _open_decoder(path)
        if self.video is not None:
            _refuse_size_change(path)
        # whether to look for key frames
        self.seeks = self.video is not None and int(self.video.get(cv2.CAP_PROP_FOURCC)) in seeking.FOURCC

    def frames_at(self, wanted):
        """Yield (t, uint8 [H, W, 3] BGR) for the frames `wanted` (ascending, none before `position`), as far as they
        decode. Frames between are decoded but not converted."""
        if self.video is None:
            yield from frame_folders.read_frames(self.path, wanted)
            self.position = min(wanted[-1] + 1, declared_frames(self.path))
            return
        for t in wanted:
            if t - self.position > seeking.FAR and self.seeks:
                self._seek(t)
            while self.position < t and self._grab():
                pass
            if self.position < t or not self._grab():
                return
            ok, frame = self.video.retrieve()
            if not ok:
                return
            yield t, frame

    def _grab(self):
        """Decode the next frame -> whether there is one."""
        there = self.video.grab()
        self.position += there
        return there

    def _seek(self, t):
        """Go to a key frame shortly before frame `t`, if one is far ahead."""
        decoder = seeking.SeekingDecoder(_plain(self.path), file_stat(self.path))
        self.seeks = bool(decoder.known.at) and self.frames in (None, decoder.known.frames)
        start = decoder.start(self.position + seeking.FAR, t) if self.seeks else None
        if start is None:
            decoder.release()
        else:
            self.video.release()
            self.video, self.position = decoder, start


def _on_screen(path, wanted, stored):
    """Yield (t, frame number stored[t] of a video) for each t of `wanted` (ascending) below len(stored)."""
    users = defaultdict(list)
    for t in wanted:
        if t < len(stored):
            users[stored[t]].append(t)
    for number, frame in frames_at(path, list(users) or [0]):
        yield from ((t, frame) for t in users[number])


def frames_at(path, wanted, fps=0, frames=None):
    """Yield (t, uint8 [H, W, 3] BGR) for the frames `wanted` (ascending) of a video, as far as they decode.

    fps: as for `decode`, whose frames `wanted` counts. frames: as for `FilmReader`, of a video as stored. Raises
    BadInput as `decode`.
    """
    if fps:
        yield from _on_screen(path, wanted, frames_at_rate(path, fps))
        return
    if os.path.isdir(path):
        yield from frame_folders.read_frames(path, wanted)
        return
    reader, some = FilmReader(path, frames), False
    for item in reader.frames_at(wanted):
        some = True
        yield item
    reader.video.release()
    if not some:
        raise BadInput(f"{path} holds no frame that OpenCV can decode; is it a video?")


def frames_at_rate(path, fps):
    """Which frame of a video is on the screen at 0, 1/fps, 2/fps, ... seconds -> list of frame numbers, ascending.

    By the frames' time stamps, so that films of mixed and of variable rates have clips of equal duration. Stamps are
    rounded to their container's ticks, a millisecond in Matroska: a frame counts as on the screen half of one early.
    """
    early, step, shown, k = Fraction(1, 2000), 1 / Fraction(fps).limit_denominator(1001), [], 0
    times, last = frame_folders.times(path) if os.path.isdir(path) else streams.frame_times(_plain(path))
    for number, end in enumerate([*times[1:], times[-1] + last - early] if times else []):
        while k * step + early < end:
            shown.append(number)
            k += 1
    return shown


def declared_frames(path, fps=0):
    """Frames that the container says `decode` gives; 0 where it says nothing. Those that it holds but does not show
    (edit lists) don't count."""
    if fps:
        return len(frames_at_rate(path, fps))
    if os.path.isdir(path):
        return len(frame_folders.list_frames(path).paths)
    count = int(cv2.VideoCapture(_plain(path), cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FRAME_COUNT))
    return max(0, count - streams.hidden_frames(_plain(path)))


def film_length(path):
    """Frames that a film declares; counted where it declares none. Raises BadInput as `decode`."""
    next(decode(path))  # refuses what is no video, before anything else opens it
    return declared_frames(path) or sum(1 for _ in decode(path))


def cut_short(path, frames, declared):
    """A message if fewer frames decode than the file declares, else None; declarations are loose: 5 % may lack. Of a
    folder of images: one if there are gaps."""
    if os.path.isdir(path):
        return frame_folders.gaps(path)
    return f"{path} is cut short: {frames} of {declared} frames decode" if frames < 0.95 * declared else None


def file_stat(path):
    """(bytes, ns of the last change) of a video, a file or a folder of images: another video has others."""
    if os.path.isdir(path):
        return frame_folders.folder_stat(path)
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def with_time_limit(seconds, path, function, *args):
    """function(*args), but BadInput naming `path` if it takes more than `seconds`: a dead disk must not stop a run.

    It runs in a thread, since a decoder that waits can't be interrupted; one that stalls is left behind.
    """
    done = {}

    def call():
        try:
            done["value"] = function(*args)
        except BaseException as e:
            done["error"] = e

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not done:
        raise BadInput(f"{path} gave nothing for {seconds:g} s; see whether its disk is well, and cut a film of hours "
                       f"by flow.py --segment")
    # `join` returns while OpenCV still clears what it kept for the thread, under a lock that a process forked meanwhile
    # would wait for for ever. So it returns only when the system has ended the thread, too.
    end = time.monotonic() + 1
    while os.path.exists(f"/proc/self/task/{thread.native_id}") and time.monotonic() < end:
        time.sleep(1e-5)
    if "error" in done:
        raise done["error"]
    return done["value"]


class Found(dict):
    """{name: path} of the videos below a folder, and what of it is no video."""

    def __init__(self, root, videos, folders, passed_over, example):
        super().__init__(sorted(videos.items()))
        self.root, self.folders, self.passed_over, self.example = root, folders, passed_over, example

    def notes(self):
        """Messages: folders of images among them, and files that were passed over."""
        return [*([f"{self.folders} folders of images count as videos"] if self.folders else []),
                *([_passed_over(self.passed_over, self.example)] if self.passed_over else [])]


def _passed_over(suffixes, example):
    shown = ", ".join(f"{suffix or 'no suffix'} {n}" for suffix, n in suffixes.most_common(6))
    return f"passed over: {sum(suffixes.values())} files that are no video by their suffix ({shown}), as {example}"


def find_videos(root):
    """All videos below `root`, links followed -> Found, {name: path} sorted by name: files of VIDEO_SUFFIXES, and
    folders that hold images only.

    Raises BadInput: no such folder, no video in it, two videos of one name, or a file and a folder of videos of one.
    """
    root = os.fspath(root)
    if not os.path.isdir(root):
        raise BadInput(f"{root} is no folder; --videos takes the folder that holds the videos")
    found, been, folders, passed_over, example = {}, set(), 0, Counter(), None

    def add(name, path):
        if name in found:
            raise BadInput(f"{found[name]} and {path} would have one name in a store, {name}; rename one")
        found[name] = path

    for folder, inside, files in os.walk(root, followlinks=True):
        if (place := os.path.realpath(folder)) in been:  # a link to a folder that holds it
            inside.clear()
            continue
        been.add(place)
        below = folder[len(os.path.join(root, "")):]
        if frame_folders.is_frame_folder(inside, files):
            if not below:
                raise BadInput(f"{root} holds images itself: one video; --videos takes the folder above it")
            add(below, folder)
            folders += 1
            continue
        for file in files:
            stem, suffix = os.path.splitext(file)
            if file.startswith("."):
                continue
            if suffix.lower() in VIDEO_SUFFIXES:
                add(os.path.join(below, stem), os.path.join(folder, file))
            else:
                passed_over[suffix.lower()] += 1
                example = example or os.path.join(folder, file)
    for below in {os.path.dirname(name) for name in found}:
        while below:
            if below.endswith(".avi") and below[:-4] in found:
                raise BadInput(f"{found[below[:-4]]} and the folder {os.path.join(root, below)} would have one name in "
                               f"a store; rename one")
            below = os.path.dirname(below)
    if not found:
        raise BadInput(f"{root} holds no video ({', '.join(sorted(VIDEO_SUFFIXES))}) and no folder of images"
                       f"{f'; {_passed_over(passed_over, example)}' if passed_over else ''}")
    return Found(root, found, folders, passed_over, example)
