"""An index of the frames that each video really gives, since containers declare counts that do not decode.

    python -m support.video_index --videos DIR --index FILE    # scans what is new or changed; lists what can't be used

pretrain.py --index leaves out what it found not to decode.
"""

import argparse
import json
import os
import time

import numpy as np
from tqdm import tqdm

from support.cli import Help, command_line
from support.errors import BadInput
from support.files import check_writable, load_arrays, save_arrays
from support.videos import cut_short, declared_frames, decode, file_stat, find_videos
from support.worker_pool import cores, run_in_processes


class Index:
    """What a scan found: {name: (bytes, time of change in ns, frames that decode, frames declared, message)}.

    The message says why a file gives no frame, or fewer than it declares, and is empty where all is well.
    """

    COLUMNS = ("bytes", "changed_ns", "frames", "declared")

    def __init__(self, entries, notes=()):
        self.entries, self.notes = entries, notes  # notes of a scan: `videos.Found.notes`

    @classmethod
    def load(cls, path):
        """Read an index file. Raises BadInput where it is missing or damaged."""
        _, arrays = load_arrays(path, "index", f"python -m support.video_index --videos DIR --index {path}")
        names, messages = json.loads(arrays["names"].tobytes()), json.loads(arrays["sentences"].tobytes())
        columns = [arrays[c].tolist() for c in cls.COLUMNS]
        return cls({name: (*row, messages.get(name, ""))
                    for name, row in zip(names, zip(*columns, strict=True), strict=True)})

    def save(self, path):
        rows = list(self.entries.values())
        columns = {c: np.array([row[k] for row in rows], np.int64) for k, c in enumerate(self.COLUMNS)}
        messages = {name: row[4] for name, row in self.entries.items() if row[4]}
        texts = {"names": list(self.entries), "sentences": messages}
        save_arrays(path, "index", {}, **columns,
                    **{k: np.frombuffer(json.dumps(text).encode(), np.uint8) for k, text in texts.items()})

    def unusable(self):
        """Names of the videos that give fewer than the two frames that flow needs."""
        return {name for name, row in self.entries.items() if row[2] < 2}


def count_frames(job, settings, report):
    """(path,) -> (frames that decode, frames declared, message or ""); work of `run_in_processes`. Raises BadInput as
    `decode`."""
    path, frames, why = job[0], 0, ""
    for _ in decode(path):
        frames += 1
        if frames % 100 == 1:
            report(frames)
    declared = declared_frames(path)
    why = cut_short(path, frames, declared) or ""
    if not why and frames == 1:
        why = f"{path} has one frame only; flow needs two"
    return frames, declared, why


def scan(root, path, workers=None, time_limit=60, progress=False):
    """Decode what is new or changed below `root` since the index at `path` was written, and bring it up to date.

    A file that crashes or stalls its reader for `time_limit` seconds is one without frames. Interrupted, a later scan
    goes on; the index on disk is always whole.
    Returns (Index, {"new", "changed", "removed", "kept": numbers of videos}). Raises BadInput as `find_videos` and
    `run_in_processes`.
    """
    found = find_videos(root)
    old = Index.load(path).entries if os.path.exists(path) else {}
    entries, jobs, known = {}, {}, dict.fromkeys(("new", "changed", "removed", "kept"), 0)
    for name, file in found.items():
        there = os.path.exists(file)  # or a dangling link
        mark = file_stat(file) if there else (0, 0)
        before = old.get(name)
        if before and before[:2] == mark:
            entries[name] = before
            known["kept"] += 1
        else:
            known["changed" if before else "new"] += 1
            if there:
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
            for name, kind, value in run_in_processes(count_frames, jobs, None, workers or cores(), time_limit):
                if kind == "progress":
                    continue
                # what is unavailable now may be back for the next scan
                mark = (0, 0) if kind == "unavailable" else jobs[name][1]
                entries[name] = (*mark, *(value if kind == "done" else (0, 0, value)))
                bar.update()
                if time.monotonic() - saved > 60:
                    save()
                    saved = time.monotonic()
    finally:
        save()
    return Index({name: entries[name] for name in found}, found.notes()), known


def main(argv=None):
    """The command -> exit status: 0, or with --strict 1 if a video gives no frames or fewer than it declares."""
    p = argparse.ArgumentParser(prog="python -m support.video_index", formatter_class=Help,
                                description="Count the frames that each video really gives.")
    p.add_argument("--videos", required=True, help="folder of videos, searched with all below it")
    p.add_argument("--index", required=True, help="file to write, or to bring up to date (.npz)")
    p.add_argument("--workers", type=int, help="processes (default: one a core)")
    p.add_argument("--time-limit", type=float, default=60, help="seconds for 100 frames (default 60)")
    p.add_argument("--strict", action="store_true", help="exit status 1 if anything is wrong with a video")
    args = p.parse_args(argv)
    if args.time_limit <= 0 or (args.workers is not None and args.workers < 1):
        raise BadInput("--time-limit and --workers must be above 0")
    check_writable(args.index, "--index")
    index, known = scan(args.videos, args.index, args.workers, args.time_limit, progress=True)
    frames = [row[2] for row in index.entries.values()]
    wrong = [row[4] for row in index.entries.values() if row[4]]
    print(f"{len(frames)} videos below {args.videos}: {known['new']} new, {known['changed']} changed, "
          f"{known['kept']} as before; {known['removed']} no longer there")
    print(f"{sum(frames)} frames decode; {len(index.unusable())} videos can't be used, "
          f"{len(wrong) - len(index.unusable())} are cut short")
    for message in [*index.notes, *wrong]:
        print(f"  {message}".encode(errors="backslashreplace").decode())  # a file name need not be Unicode
    return int(args.strict and bool(wrong))


if __name__ == "__main__":
    command_line(main)
