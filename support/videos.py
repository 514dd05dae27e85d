"""Video files: which there are below a folder, and their frames.

One sequential pass with OpenCV's FFmpeg, since the containers' frame counts and seeks are not to be trusted.
"""

import os
import threading
from contextlib import suppress

import cv2

from support.errors import BadInput

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read once by OpenCV; our message instead of a codec's
cv2.setNumThreads(1)  # processes are the parallelism; one forked after OpenCV's threads had work would wait for them



# what FFmpeg takes for a list of other files to open, whatever its name: concat, HLS, DASH, SDP
PLAYLISTS = (b"ffconcat", b"#extm3u", b"<?xml", b"<mpd", b"v=0")  # at the start
PLAYLISTS_WITHIN = (b"dash:profile:", b"\nc=in ip")
VIDEO_SUFFIXES = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"}


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
        return cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    finally:
        cv2.utils.logging.setLogLevel(level)


def decode(path):
    """Yield the frames of a video in one sequential pass, uint8 [H, W, 3], BGR as OpenCV gives them.

    Raises BadInput, naming the file, if it can't be opened or has no frame. A file cut short gives what decodes.
    """
    video, n = _open_decoder(path), 0
    while True:
        ok, frame = video.read()
        if not ok:
            break
        n += 1
        yield frame
    video.release()
    if n == 0:
        raise BadInput(f"{path} holds no frame that OpenCV can decode; is it a video?")


def frames_at(path, wanted):
    """Yield (t, uint8 [H, W, 3] BGR) for the frames `wanted` (ascending) of a video, as far as they decode, in one
    sequential pass. Frames between are decoded but not converted. Raises BadInput as `decode`."""
    video, need, some = _open_decoder(path), set(wanted), False
    for t in range(wanted[-1] + 1):
        if not video.grab():
            break
        if t in need:
            ok, frame = video.retrieve()
            if not ok:
                break
            some = True
            yield t, frame
    video.release()
    if not some:
        raise BadInput(f"{path} holds no frame that OpenCV can decode; is it a video?")


def declared_frames(path):
    """Frames that the container declares; 0 where it says nothing."""
    return max(0, int(cv2.VideoCapture(str(path), cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FRAME_COUNT)))


def cut_short(path, frames, declared):
    """A message if fewer frames decode than the file declares, else None; declarations are loose: 5 % may lack."""
    return f"{path} is cut short: {frames} of {declared} frames decode" if frames < 0.95 * declared else None


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
    if "error" in done:
        raise done["error"]
    if "value" not in done:
        raise BadInput(f"{path} gave nothing for {seconds:g} s; see whether its disk is well")
    return done["value"]


def find_videos(root):
    """All video files below `root`, links followed -> {name: path}, sorted by name.

    Raises BadInput: no such folder, no video in it, two files of one name, or a file and a folder of videos of one.
    """
    root = os.fspath(root)
    if not os.path.isdir(root):
        raise BadInput(f"{root} is no folder; --videos takes the folder that holds the videos")
    found, been = {}, set()
    for folder, inside, files in os.walk(root, followlinks=True):
        if (place := os.path.realpath(folder)) in been:  # a link to a folder that holds it
            inside.clear()
            continue
        been.add(place)
        below = folder[len(os.path.join(root, "")):]
        for file in files:
            stem, suffix = os.path.splitext(file)
            if suffix.lower() in VIDEO_SUFFIXES and not file.startswith("."):
                path, name = os.path.join(folder, file), os.path.join(below, stem)
                if name in found:
                    raise BadInput(f"{found[name]} and {path} differ by suffix only, so their flow would have one "
                                   f"name; rename one")
                found[name] = path
    for below in {os.path.dirname(name) for name in found}:
        while below:
            if below.endswith(".avi") and below[:-4] in found:
                raise BadInput(f"{found[below[:-4]]} and the folder {os.path.join(root, below)} would have one name in "
                               f"a store; rename one")
            below = os.path.dirname(below)
    if not found:
        raise BadInput(f"{root} holds no video ({', '.join(sorted(VIDEO_SUFFIXES))})")
    return dict(sorted(found.items()))
