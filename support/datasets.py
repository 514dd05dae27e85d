"""Data sets in their published layouts: which videos a subset has, and their labels.

In   a folder of videos; the split files of UCF101, HMDB51, Kinetics, Diving-48 and Something-Something V2 as their
     authors, and other projects, publish them; or lists of one's own.
Out  `read_split`: a VideoSet. Another data set is one more function in `DATASETS` (docs/data.md).
"""

import csv
import json
import os
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

from support.errors import BadInput
from support.video_index import Index
from support.videos import VIDEO_SUFFIXES, Found, find_videos


class Video(NamedTuple):
    path: str
    name: str  # path below --videos without suffix: its key in the flow store
    label: int  # -1 where there are no labels
    first: int = 0  # of a piece of a longer film: its first frame
    frames: int | None = None  # and their number


class VideoSet(NamedTuple):
    videos: list  # of Video
    classes: list  # of class names; a label is a place in it
    absent: list  # what the split file names and the folder lacks
    faulty: list  # names of those that the index says can't be used
    unused: tuple = ()  # a message for each that is there and listed, but of no class or without flow
    notes: tuple = ()  # messages: what the folders and lists were taken for, and what was passed over

    def skipped(self):
        """A message for each video that is listed and not used."""
        return [*(f"{name}: listed, but absent" for name in self.absent), *self.unused]


class Listing(NamedTuple):
    """What a reader of DATASETS finds."""
    classes: list
    entries: list  # of (name below --videos or other keys of `names_of`, most exact first; class or None)
    notes: list


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------
def _split_file(splits, *names):
    """The first of `names` found in `splits` or one folder below."""
    for name in names:
        for path in [Path(splits) / name, *sorted(Path(splits).glob(f"*/{name}"))]:
            if path.is_file():
                return path
    raise BadInput(f"{splits} lacks {' or '.join(names)}; --splits takes the folder of the data set's official lists")


def _text(path):
    return path.read_text(encoding="utf-8-sig")  # without the mark that some editors put at the start


def _lines(path):
    return [line.strip() for line in _text(path).splitlines() if line.strip()]


def _table(path):
    """A csv file with a header -> its rows as {column: value}, column names in lower case."""
    header, *rows = csv.reader(_text(path).splitlines(), skipinitialspace=True)
    header = [name.strip().lower() for name in header]
    return [dict(zip(header, map(str.strip, row), strict=False)) for row in rows if row]


HEADERS = {"path", "video", "video_path", "file", "filename", "file_name", "name", "video_name", "id", "video_id"}


def _fields(line, separator):
    """A line as csv has it; one field, the line, where its quotes don't fit the separator."""
    try:
        return [field.strip() for field in next(csv.reader([line], delimiter=separator, skipinitialspace=True,
                                                           strict=True))]
    except csv.Error:
        return [line]


def _path_label_rows(path):
    """A list of "path label", "path,label", "path;label" or tab, or of paths alone -> [(path, label or None), ...].

    The separator is the one by which every line has two fields; quotes as in csv. A header is passed over.
    """
    lines = _lines(path)
    by_separator = {separator: [_fields(line, separator) for line in lines] for separator in "\t,; "}
    for rows in by_separator.values():
        if rows and all(len(row) == 2 for row in rows):
            return [tuple(row) for row in rows[rows[0][0].lower() in HEADERS:]]
    if all(len(row) == 1 for rows in by_separator.values() for row in rows):
        rows = by_separator[","]
        return [(row[0], None) for row in rows[bool(rows) and rows[0][0].lower() in HEADERS:]]
    rows = max(by_separator.values(), key=lambda rows: sum(len(row) == 2 for row in rows))
    number = next(k for k, row in enumerate(rows) if len(row) != 2)
    raise BadInput(f"{path}, entry {number + 1} ({lines[number]}) is not \"path label\", \"path,label\" or with a tab "
                   f"between the two, as the others are; a path or label that holds the separator needs quotes")


def _ordered(labels):
    """Class names in order: by number where all are numbers."""
    names = {label for label in labels if label is not None}
    return sorted(names, key=int) if all(name.isdecimal() for name in names) else sorted(names)


# ---------------------------------------------------------------------------------------------------------------------
# The data sets
# ---------------------------------------------------------------------------------------------------------------------
def _ucf101(found, splits, split, subset):
    # "1 ApplyEyeMakeup"; "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1", the label on training lists only
    classes = [line.split(maxsplit=1)[1] for line in _lines(_split_file(splits, "classInd.txt"))]
    path = _split_file(splits, f"{subset}list{split:02d}.txt")
    names = [os.path.splitext(re.sub(r"\s+\d+$", "", line))[0] for line in _lines(path)]
    entries = [((name,), name.split("/")[0]) for name in names]
    lacking = _ordered({label for (name,), label in entries if label not in classes and name in found})
    return Listing(classes, entries, [f"{path.parent / 'classInd.txt'} lacks {len(lacking)} classes of listed videos "
                                      f"that are there ({', '.join(lacking[:5])}); they have no label"] * bool(lacking))


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
        entries += [((f"{label}/{os.path.splitext(e)[0]}",), label) for e, use in rows if use == wanted]
    return Listing([f.name.removesuffix(ending) for f in files], entries, [])


CLIP_OF_ID = re.compile(r"(.+)_\d{6}_\d{6}$")  # Kinetics: <id>_<start>_<end>, seconds
NUMBERED = re.compile(r"(.+?)[\s,;]+(?:\d+[\s,;]+)?(\d+)$")  # "path label" or "path frames label", of numbers


def _kinetics_table(path):
    """The official csv (label, youtube_id, time_start, time_end, split) -> entries."""
    entries = []
    for row in _table(path):
        start, end = (int(float(row[column])) for column in ("time_start", "time_end"))  # 10 or 10.0
        label = row.get("label") or None  # none in the published test lists
        entries.append(((f"{row['youtube_id']}_{start:06d}_{end:06d}", row["youtube_id"]),
                        label and label.replace(" ", "_")))
    return entries


def _kinetics_rows(path, splits):
    """Other projects' lists: "class/clip.mp4 label", "clip.mp4,label", "class/clip frames label" -> entries.

    A number becomes a name: by label_map*.txt beside the lists, or by the folder where each class has one.
    """
    rows = [m.groups() if (m := NUMBERED.match(line)) else None for line in _lines(path)]
    if None in rows:
        rows = _path_label_rows(path)
    rows = [(name.strip('"'), label) for name, label in rows]
    folders = {(os.path.basename(os.path.dirname(name)), label) for name, label in rows}
    one_each = len({f for f, _ in folders}) == len({label for _, label in folders}) == len(folders)
    maps = sorted(Path(splits).rglob("label_map*.txt"))
    numbers = all(label is not None and label.isdecimal() for _, label in rows)
    if maps and numbers:
        names = {str(k): line for k, line in enumerate(_lines(maps[0]))}
    elif one_each and "" not in {f for f, _ in folders}:
        names = {label: folder for folder, label in folders}
    else:
        names = {}
    entries = []
    for name, label in rows:
        base = os.path.basename(os.path.splitext(name)[0] if _has_suffix(name) else name)
        clip = CLIP_OF_ID.match(base)
        entries.append(((base, *([clip[1]] if clip else [])), label and names.get(label, label).replace(" ", "_")))
    return entries


def _has_suffix(name):
    return os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES


def _k400(found, splits, split, subset):
    # the official csv, another project's list, or train|val/<class>/ alone
    parts = {"train": ["train"], "test": ["val", "validate", "validation"]}[subset]
    if splits is None:
        return _by_folder(found, subset, ("val", *TEST))
    path = _split_file(splits, *(form.format(part) for form in (
        "{}.csv", "{}_videofolder.txt", "kinetics400_{}_list_videos.txt", "kinetics400_{}_list_rawframes.txt",
        "kinetics_{}_list.txt", "{}.txt", "{}_list.txt") for part in parts))
    official = "youtube_id" in next(iter(_lines(path)), "")
    entries = _kinetics_table(path) if official else _kinetics_rows(path, splits)
    return Listing(_ordered(label for _, label in entries), entries, [f"{subset} list: {path}"])


def _diving48(found, splits, split, subset):
    # [{"vid_name": ..., "label": 0..47, "start_frame": ..., "end_frame": ...}, ...], one file a subset; V2 before V1
    path = _split_file(splits, f"Diving48_V2_{subset}.json", f"Diving48_{subset}.json")
    classes = ["-".join(c) for c in json.loads(_text(_split_file(splits, "Diving48_vocab.json")))]
    entries = [((e["vid_name"],), classes[e["label"]]) for e in json.loads(_text(path))]
    return Listing(classes, entries, [f"{subset} list: {path}"])


def _ssv2(found, splits, split, subset):
    # [{"id": "78687", "template": "Holding [something] next to [something]", ...}, ...]; labels without brackets
    part = {"train": "train", "test": "validation"}[subset]
    path = _split_file(splits, f"something-something-v2-{part}.json", f"{part}.json")
    numbers = json.loads(_text(_split_file(splits, "something-something-v2-labels.json", "labels.json")))
    entries = [((str(e["id"]),), e["template"].replace("[", "").replace("]", "")) for e in json.loads(_text(path))]
    return Listing(sorted(numbers, key=lambda name: int(numbers[name])), entries, [])


def _list(found, splits, split, subset):
    # train.csv or .txt, test.csv or .txt: path below --videos, and a label
    path = _split_file(splits, f"{subset}.csv", f"{subset}.txt")
    rows = _path_label_rows(path)
    if not rows:
        raise BadInput(f"{path} names no video; it takes \"path label\" a line")
    entries = []
    for name, label in rows:
        name = os.path.normpath(name)
        if os.path.isabs(name):
            name = os.path.relpath(name, os.path.abspath(found.root))
        entries.append(((name, *([os.path.splitext(name)[0]] if _has_suffix(name) else [])), label))
    return Listing(_ordered(label for _, label in entries), entries, [])


TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "validation", "validate", "valid")


def _part(found, names):
    """The top folder of `found` that is called as the first of `names` that occurs, in any case -> folder or None."""
    tops = {n.split(os.sep)[0] for n in found if os.sep in n}
    for name in names:
        same = sorted(top for top in tops if top.lower() == name)
        if len(same) > 1:
            raise BadInput(f"--videos holds {' and '.join(f'{top}/' for top in same)}; which is it? Rename one")
        if same:
            return same[0]
    return None


def _division(found, subset, test_names):
    """-> (the top folder that holds a subset, or None where the set isn't divided; the top folders that divide it)."""
    tops = sorted({n.split(os.sep)[0] for n in found if os.sep in n})
    parts = [top for top in tops if top.lower() in TRAIN + TEST]
    classes = [f"{top}/" for top in tops if top not in parts]
    if parts and classes:
        raise BadInput(f"--videos holds {', '.join(f'{p}/' for p in parts)} beside {', '.join(classes[:5])}: a class, "
                       f"or a part of the data? Rename it if it is a class; otherwise move the others into it or "
                       f"elsewhere")
    part = _part(found, TRAIN if subset == "train" else test_names)
    if part is None and (parts or subset != "train"):
        other = test_names[0]
        raise BadInput(f"--videos has no folder {subset if subset == 'train' else other}/, so there is nothing to "
                       f"{subset} on; divide it in train/ and {other}/")
    return part, parts


def _by_folder(found, subset, test_names):
    """Labels from folders: <part>/<class>/..., or <class>/... where there is no such division (training only)."""
    part, parts = _division(found, subset, test_names)
    below = int(part is not None)
    names = [n.split(os.sep) for n in found]
    own = [n for n in names if not below or (n[0] == part and len(n) > 1)]
    entries = [((os.sep.join(n),), n[below] if len(n) > below + 1 else None) for n in own]
    labels, bare = _ordered(label for _, label in entries), sum(label is None for _, label in entries)
    shown = f" ({', '.join(labels[:5])}{', ...' if labels[5:] else ''})" if labels else ""
    where = f"{part}/" if below else "--videos"
    notes = [f"{subset}: {len(entries)} videos below {where}, of {len(labels)} classes{shown}"]
    notes += [f"{bare} of them lie in no class's folder and have no label"] * bool(bare and labels)
    used = {part, _part(found, TRAIN), _part(found, test_names)}
    passed = [f"{top}/" for top in parts if top not in used]
    loose = sum(len(n) == 1 for n in names) if below else 0
    passed += [f"{loose} videos outside of {' and '.join(f'{p}/' for p in parts)}"] * bool(loose)
    return Listing(labels, entries, notes + [f"passed over: {', '.join(passed)}"] * bool(passed))


def _folder(found, splits, split, subset):
    return _by_folder(found, subset, TEST)


DATASETS = {"folder": _folder, "list": _list, "ucf101": _ucf101, "hmdb51": _hmdb51, "k400": _k400,
            "diving48": _diving48, "ssv2": _ssv2}


def names_of(dataset, found):
    """What a list may call each video -> {key: names}: its path below --videos without suffix; where lists name videos
    by id, wherever the file lies, its own name too, and of Kinetics' <id>_<start>_<end> the id."""
    keys = defaultdict(list)
    for name in found:
        keys[name].append(name)
        if dataset in ("k400", "diving48", "ssv2"):
            base = os.path.basename(name)
            clip = CLIP_OF_ID.match(base) if dataset == "k400" else None
            for key in {base, clip[1] if clip else base} - {name}:
                keys[key].append(name)
    return keys


def _choose(names, label):
    """Of several videos that one entry may mean, the one below a folder of its class, else the first."""
    return next((n for n in names if label and label in n.replace(" ", "_").split(os.sep)), names[0])


def films_of(store, videos):
    """The films of a flow store as `find_videos` gives those of a folder; paths of lists are below `videos`."""
    films = store.films()
    if not films:
        raise BadInput(f"{store.root} holds no flow yet; run: {store.command}")
    return Found(os.fspath(videos or store.root), films, 0, Counter(), None)


def read_split(dataset, videos, splits=None, split=1, subset="train", index=None, store=None):
    """The videos of one subset of a data set -> VideoSet, in the split file's order.

    dataset: a key of DATASETS. videos: the folder of videos. splits: the folder of the official lists (none needed for
    "folder"; optional for "k400"). split: 1-3 (UCF101, HMDB51). subset: "train" or "test".
    index: a file of `scan`; videos of which it knows that fewer than two frames decode are left out.
    store: a FlowStore whose films are taken in place of those of `videos`, which need not be there.
    Raises BadInput where a folder or list is missing or malformed, or none of the listed videos is there.
    """
    if splits is None and dataset not in ("folder", "k400"):
        raise BadInput(f"--dataset {dataset} needs --splits, the folder of its lists")
    if splits is not None and not os.path.isdir(splits):
        raise BadInput(f"--splits {splits} is no folder")
    found = films_of(store, videos) if store else find_videos(videos)
    try:
        classes, entries, notes = DATASETS[dataset](found, splits, split, subset)
    except BadInput:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError, csv.Error) as e:
        raise BadInput(f"--splits {splits} is not in {dataset}'s published format ({type(e).__name__}: {e})") from e
    lookup, label_of = names_of(dataset, found), {c: i for i, c in enumerate(classes)}
    unusable = Index.load(index).unusable() if index else set()
    kept, absent, faulty, seen, repeated, several = [], [], [], set(), [], []
    for keys, label in entries:
        names = next((lookup[key] for key in keys if key in lookup), [])
        if not names:
            absent.append(keys[0])
            continue
        name = _choose(names, label)
        several += [keys[0]] * (len(names) > 1)
        if name in seen:
            repeated.append(keys[0])
        elif name in unusable:
            faulty.append(name)
        else:
            kept.append(Video(found[name], name, label_of.get(label, -1)))
        seen.add(name)
    notes += [f"{len(x)} entries of the {subset} list {words}, as {x[0]}" for x, words in (
        (repeated, "name a video once more and are passed over"), (several, "fit several videos; one is taken")) if x]
    if not kept:
        where = f"in {store.root}" if store else f"below {videos} and decodes"
        raise BadInput(f"none of the {len(entries)} videos of {dataset}'s {subset} list is {where} "
                       f"(the first would be {(absent or faulty or ['-'])[0]})")
    return VideoSet(kept, classes, absent, faulty, notes=(*found.notes(), *notes))
