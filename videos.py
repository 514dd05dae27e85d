"""Which videos there are: folders, the data sets' official lists, decoding, and an index of what decodes.

In   a folder of videos; the split files of UCF101, HMDB51, Kinetics-400 and Diving-48 as their authors publish them.
Out  `read_split`: the videos of a subset with their labels. `scan`: an index file (.npz, see `Index`) with the frames
     that each file really gives, since containers declare counts that do not decode (HMDB51: one too many).

    python videos.py --videos DIR --index FILE        # scans what is new or changed since; lists what can't be used

data.py passes the names on: stages say `data.read_split`.
"""

import argparse
import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from tqdm import tqdm

from stores import BadInput, Help, command_line, load_arrays, save_arrays
from workers import cores, in_processes

os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # read once by OpenCV; our sentence instead of a codec's
cv2.setNumThreads(1)  # processes are the parallelism; one forked after OpenCV's threads had work would wait for them
# what FFmpeg takes for a list of other files to open, whatever its name: concat, HLS, DASH, SDP
PLAYLISTS = (b"ffconcat", b"#extm3u", b"<?xml", b"<mpd", b"v=0")  # at the start
PLAYLISTS_WITHIN = (b"dash:profile:", b"\nc=in ip")
VIDEO_SUFFIXES = {".avi", ".mp4", ".mkv", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"}


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------
def _open(path):
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
    video, n = _open(path), 0
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
    video, need, some = _open(path), set(wanted), False
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


def within(seconds, path, function, *args):
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


# ---------------------------------------------------------------------------------------------------------------------
# Split files: which videos a data set has, as its authors publish them
# ---------------------------------------------------------------------------------------------------------------------
class Video(NamedTuple):
    path: str
    name: str  # path below --videos without suffix: its key in the flow store
    label: int  # -1 where there are no labels


class VideoSet(NamedTuple):
    videos: list  # of Video
    classes: list  # of class names; a label is a place in it
    absent: list  # what the split file names and the folder lacks
    faulty: list  # names of those that the index says can't be used


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


def _split_file(splits, *names):
    """The first of `names` found in `splits` or one folder below."""
    for name in names:
        for path in [Path(splits) / name, *sorted(Path(splits).glob(f"*/{name}"))]:
            if path.is_file():
                return path
    raise BadInput(f"{splits} lacks {' or '.join(names)}; --splits takes the folder of the data set's official lists")


def _lines(path):
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _ucf101(found, splits, split, subset):
    # "1 ApplyEyeMakeup"; "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1", the label on training lists only
    classes = [line.split()[1] for line in _lines(_split_file(splits, "classInd.txt"))]
    listed = [line.split()[0] for line in _lines(_split_file(splits, f"{subset}list{split:02d}.txt"))]
    return classes, [(os.path.splitext(e)[0], e.split("/")[0]) for e in listed]


def _hmdb51(found, splits, split, subset):
    # brush_hair_test_split1.txt: "<file> 1" (train), 2 (test), 0 (unused)
    ending, wanted = f"_test_split{split}.txt", {"train": "1", "test": "2"}[subset]
    files = sorted(Path(splits).rglob(f"*{ending}"))
    if not files:
        raise BadInput(f"{splits} lacks <class>{ending}; --splits takes HMDB51's testTrainMulti_7030_splits")
    entries = []
    for file in files:
        label = file.name.removesuffix(ending)
        rows = (line.rsplit(maxsplit=1) for line in _lines(file))
        entries += [(f"{label}/{os.path.splitext(e)[0]}", label) for e, use in rows if use == wanted]
    return [f.name.removesuffix(ending) for f in files], entries


def _k400(found, splits, split, subset):
    # official csv (label,youtube_id,time_start,...), or "class/id_start_end frames label", or train|val/<class>/ alone
    part = {"train": "train", "test": "val"}[subset]
    if splits is None:
        return _by_folder(found, part)
    path = _split_file(splits, f"{part}.csv", *(["validate.csv"] if part == "val" else []), f"{part}_videofolder.txt")
    if path.suffix == ".csv":
        rows = [line.split(",") for line in _lines(path)[1:]]
        entries = [(f"{r[1]}_{int(r[2]):06d}_{int(r[3]):06d}", r[0].strip('"').replace(" ", "_")) for r in rows]
    else:
        rows = [line.rsplit(maxsplit=2)[0] for line in _lines(path)]
        entries = [(os.path.basename(r), os.path.dirname(r).replace(" ", "_")) for r in rows]
    return sorted({label for _, label in entries}), entries


def _diving48(found, splits, split, subset):
    # [{"vid_name": ..., "label": 0..47, "start_frame": ..., "end_frame": ...}, ...], one file a subset
    path = _split_file(splits, f"Diving48_V2_{subset}.json")
    classes = ["-".join(c) for c in json.loads(_split_file(splits, "Diving48_vocab.json").read_text())]
    return classes, [(e["vid_name"], classes[e["label"]]) for e in json.loads(path.read_text())]


def _by_folder(found, part):
    """Labels from folders: <part>/<class>/..., or <class>/... where there is no such division (training only)."""
    parts = {n.split(os.sep)[0] for n in found}
    below = 1 if part in parts else 0
    if not below and part != "train":
        raise BadInput(f"--videos has no folder {part}/, so there is nothing to test on; divide it "
                       f"in train/ and {part}/")
    names = [n.split(os.sep) for n in found]
    names = [n for n in names if not below or n[0] == part]
    entries = [(os.sep.join(n), n[below] if len(n) > below + 1 else None) for n in names]
    return sorted({label for _, label in entries if label is not None}), entries


def _folder(found, splits, split, subset):
    return _by_folder(found, subset)


DATASETS = {"folder": _folder, "ucf101": _ucf101, "hmdb51": _hmdb51, "k400": _k400, "diving48": _diving48}


def read_split(dataset, videos, splits=None, split=1, subset="train", index=None):
    """The videos of one subset of a data set -> VideoSet, in the split file's order.

    dataset: a key of DATASETS. videos: the folder of videos. splits: the folder of the official lists (none needed for
    "folder"; optional for "k400"). split: 1-3 (UCF101, HMDB51). subset: "train" or "test".
    index: a file of `scan`; videos of which it knows that fewer than two frames decode are left out.
    Raises BadInput where a folder or list is missing or malformed, or none of the listed videos is there.
    """
    if splits is None and dataset not in ("folder", "k400"):
        raise BadInput(f"--dataset {dataset} needs --splits, the folder of its official lists")
    if splits is not None and not os.path.isdir(splits):
        raise BadInput(f"--splits {splits} is no folder")
    found = find_videos(videos)
    try:
        classes, entries = DATASETS[dataset](found, splits, split, subset)
    except (IndexError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise BadInput(f"--splits {splits} is not in {dataset}'s published format ({type(e).__name__}: {e})") from e
    lookup = {n: n for n in found}
    if dataset in ("k400", "diving48"):  # their lists name videos by id, wherever the file lies
        lookup |= {os.path.basename(n): n for n in found}
    label_of = {c: i for i, c in enumerate(classes)}
    unusable = Index.load(index).unusable() if index else set()
    kept, absent, faulty = [], [], []
    for entry, label in entries:
        name = lookup.get(entry)
        if name is None:
            absent.append(entry)
        elif name in unusable:
            faulty.append(name)
        else:
            kept.append(Video(found[name], name, label_of.get(label, -1)))
    if not kept:
        raise BadInput(f"none of the {len(entries)} videos of {dataset}'s {subset} list is below {videos} and decodes "
                       f"(the first would be {(absent or faulty or ['-'])[0]})")
    return VideoSet(kept, classes, absent, faulty)


# ---------------------------------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------------------------------
class Index:
    """What a scan found: {name: (bytes, time of change in ns, frames that decode, frames declared, sentence)}.

    The sentence says why a file gives no frame, or fewer than it declares, and is empty where all is well.
    """

    COLUMNS = ("bytes", "changed_ns", "frames", "declared")

    def __init__(self, entries):
        self.entries = entries

    @classmethod
    def load(cls, path):
        """Read an index file. Raises BadInput where it is missing or damaged."""
        _, arrays = load_arrays(path, "index", f"python videos.py --videos DIR --index {path}")
        names, sentences = json.loads(arrays["names"].tobytes()), json.loads(arrays["sentences"].tobytes())
        columns = [arrays[c].tolist() for c in cls.COLUMNS]
        return cls({name: (*row, sentences.get(name, ""))
                    for name, row in zip(names, zip(*columns, strict=True), strict=True)})

    def save(self, path):
        rows = list(self.entries.values())
        columns = {c: np.array([row[k] for row in rows], np.int64) for k, c in enumerate(self.COLUMNS)}
        sentences = {name: row[4] for name, row in self.entries.items() if row[4]}
        texts = {"names": list(self.entries), "sentences": sentences}
        save_arrays(path, "index", {}, **columns,
                    **{k: np.frombuffer(json.dumps(text).encode(), np.uint8) for k, text in texts.items()})

    def unusable(self):
        """Names of the videos that give fewer than the two frames that flow needs."""
        return {name for name, row in self.entries.items() if row[2] < 2}


def count_frames(job, settings, tell):
    """(path,) -> (frames that decode, frames declared, sentence or ""); work of `in_processes`. Raises BadInput as
    `decode`."""
    path, frames, why = job[0], 0, ""
    for _ in decode(path):
        frames += 1
        if frames % 100 == 1:
            tell(frames)
    declared = max(0, int(cv2.VideoCapture(str(path), cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FRAME_COUNT)))
    if frames < 0.95 * declared:
        why = f"{path} is cut short: {frames} of {declared} frames decode"
    elif frames == 1:
        why = f"{path} has one frame only; flow needs two"
    return frames, declared, why


def scan(root, path, workers=None, time_limit=60, progress=False):
    """Decode what is new or changed below `root` since the index at `path` was written, and bring it up to date.

    A file that crashes or stalls its reader for `time_limit` seconds is one without frames. Interrupted, a later scan
    goes on; the index on disk is always whole.
    Returns (Index, {"new", "changed", "removed", "kept": numbers of videos}). Raises BadInput as `find_videos` and
    `in_processes`.
    """
    found = find_videos(root)
    old = Index.load(path).entries if os.path.exists(path) else {}
    entries, jobs, known = {}, {}, dict.fromkeys(("new", "changed", "removed", "kept"), 0)
    for name, file in found.items():
        stat = os.stat(file) if os.path.exists(file) else None  # a dangling link
        mark = (stat.st_size, stat.st_mtime_ns) if stat else (0, 0)
        before = old.get(name)
        if before and before[:2] == mark:
            entries[name] = before
            known["kept"] += 1
        else:
            known["changed" if before else "new"] += 1
            if stat:
                jobs[name] = file, mark
            else:
                entries[name] = (*mark, 0, 0, f"{file} doesn't exist")
    known["removed"] = len(old.keys() - found.keys())

    def save():
        Index({name: entries[name] for name in found if name in entries}).save(path)

    if not os.path.exists(path):
        save()  # what can't be written is said before the work
    saved = time.monotonic()
    try:
        with tqdm(total=len(jobs), unit="video", disable=not progress) as bar:
            for name, kind, value in in_processes(count_frames, jobs, None, workers or cores(), time_limit):
                if kind == "told":
                    continue
                mark = (0, 0) if kind == "away" else jobs[name][1]  # what is away now may be back for the next scan
                entries[name] = (*mark, *(value if kind == "done" else (0, 0, value)))
                bar.update()
                if time.monotonic() - saved > 60:
                    save()
                    saved = time.monotonic()
    finally:
        save()
    return Index({name: entries[name] for name in found}), known


def main(argv=None):
    """The command -> exit status: 0, or with --strict 1 if a video gives no frames or fewer than it declares."""
    p = argparse.ArgumentParser(prog="videos.py", description="Count the frames that each video really gives.",
                                formatter_class=Help)
    p.add_argument("--videos", required=True, help="folder of videos, searched with all below it")
    p.add_argument("--index", required=True, help="file to write, or to bring up to date (.npz)")
    p.add_argument("--workers", type=int, help="processes (default: one a core)")
    p.add_argument("--time-limit", type=float, default=60, help="seconds for 100 frames (default 60)")
    p.add_argument("--strict", action="store_true", help="exit status 1 if anything is wrong with a video")
    args = p.parse_args(argv)
    if args.time_limit <= 0 or (args.workers is not None and args.workers < 1):
        raise BadInput("--time-limit and --workers must be above 0")
    index, known = scan(args.videos, args.index, args.workers, args.time_limit, progress=True)
    frames = [row[2] for row in index.entries.values()]
    wrong = [row[4] for row in index.entries.values() if row[4]]
    print(f"{len(frames)} videos below {args.videos}: {known['new']} new, {known['changed']} changed, "
          f"{known['kept']} as before; {known['removed']} no longer there")
    print(f"{sum(frames)} frames decode; {len(index.unusable())} videos can't be used, "
          f"{len(wrong) - len(index.unusable())} are cut short")
    for sentence in wrong:
        print(f"  {sentence}".encode(errors="backslashreplace").decode())  # a file name need not be Unicode
    return int(args.strict and bool(wrong))


if __name__ == "__main__":
    command_line(main)
