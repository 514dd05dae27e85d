"""Data sets in their published layouts: which videos a subset has, and their labels.

In   a folder of videos; the split files of UCF101, HMDB51, Kinetics-400 and Diving-48 as their authors publish them.
Out  `read_split`: a VideoSet. Another data set is one more function in `DATASETS` (docs/data.md).
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

from support.errors import BadInput
from support.video_index import Index
from support.videos import find_videos


class Video(NamedTuple):
    path: str
    name: str  # path below --videos without suffix: its key in the flow store
    label: int  # -1 where there are no labels


class VideoSet(NamedTuple):
    videos: list  # of Video
    classes: list  # of class names; a label is a place in it
    absent: list  # what the split file names and the folder lacks
    faulty: list  # names of those that the index says can't be used


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
