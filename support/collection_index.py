"""The index of a collection: a feature of every film, or of every piece of one, and what it is a feature of.

One .npz that NumPy reads: rgb and flow (of the views there are) float32 [n, D], rows of unit length; files [n], paths
below the header's `videos`; spans float64 [n, 2], begin and end in seconds; frames int64 [n, 2], first and number
(0: all); marks int64 [n, 4], bytes and time of change in ns of the film and of its flow, by which a changed one is
known; header, a JSON text that says of which weights, protocol and flow the features are.

While an index is made its parts lie beside it, each of 16 films and an index in itself, so that an interrupted one goes
on where it was, whatever became of the folder since.
"""

import json
import os
import re
import time
import uuid
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import data
from support.datasets import Video
from support.errors import BadInput
from support.features import BLOCK, NETWORK, extract_blocks, fingerprint, load_network, view_features
from support.files import load_arrays, save_arrays, temporary_folder
from support.flow_methods import choose_backend
from support.flow_pipeline import Job, Settings, declared_fps, extract_video
from support.inference import mean_over_views
from support.stores import FlowStore
from support.videos import file_stat, film_length, find_videos, with_time_limit
from support.weights import Backbones, read_state, view_and_path
from support.worker_pool import cores, run_in_processes

KIND = "index of a collection"
MADE_BY = "python search.py index --checkpoint RUN --videos DIR --out {}"
QUERY_LIMIT = 600  # seconds in which the film of a query must give its length
SAME = ("weights", "views", *NETWORK, "protocol", "flow", "segment")  # of the header: what decides a feature


class Collection(NamedTuple):
    """What an index holds; the first axis of all arrays is that of its n entries."""

    header: dict
    files: np.ndarray  # str
    spans: np.ndarray
    frames: np.ndarray
    marks: np.ndarray
    values: dict  # view -> unit rows float32 [n, D]

    def paths(self):
        return [os.path.join(self.header["videos"], str(file)) for file in self.files]

    def take(self, rows):
        rows = np.asarray(rows, np.int64)
        return self._replace(files=self.files[rows], spans=self.spans[rows], frames=self.frames[rows],
                             marks=self.marks[rows], values={v: x[rows] for v, x in self.values.items()})

    def keys(self):
        """(file, first frame) of each entry, which no two share."""
        return list(zip(self.files.tolist(), self.frames[:, 0].tolist(), strict=True))


def load_collection(path):
    """Read an index. Raises BadInput where it is missing, damaged or something else."""
    header, arrays = load_arrays(path, KIND, MADE_BY.format(path))
    try:
        values = {view: arrays[view] for view in header["views"]}
        found = Collection(header, *(arrays[k] for k in ("files", "spans", "frames", "marks")), values)
    except KeyError as e:
        raise BadInput(f"{path} is damaged ({e} is missing); make it anew: {MADE_BY.format(path)}") from e
    rows = {len(x) for x in (*found[1:5], *values.values())}
    if len(rows) != 1 or not all(x.ndim == 2 and np.isfinite(x).all() for x in values.values()):
        raise BadInput(f"{path} is damaged (rows are lacking or no numbers); make it anew: {MADE_BY.format(path)}")
    if not rows.pop():
        raise BadInput(f"{path} holds no film; delete it, and index some: {MADE_BY.format(path)}")
    return found


def save_collection(path, collection):
    order = sorted(range(len(collection.files)), key=collection.keys().__getitem__)  # whoever made which part
    c = collection.take(order)
    save_arrays(path, KIND, c.header, files=c.files, spans=c.spans, frames=c.frames, marks=c.marks, **c.values)


def check_header(path, header, wanted, cure):
    """Raise BadInput where an index is of other weights or settings than `wanted`, a header."""
    differing = [k for k in SAME if header.get(k) != wanted.get(k)]
    if "views" in differing:
        differing = [k for k in differing if k not in ("weights", "flow")]  # of other views they differ anyway
    if differing:
        def shown(key, value):
            return "none" if not value else " and ".join(value) if key == "views" else str(value)[:12]
        what = ", ".join(f"{k}: {shown(k, header.get(k))} there, {shown(k, wanted.get(k))} now" if k != "flow" else
                         "flow of other settings" for k in differing)
        raise BadInput(f"{path} was made with other weights or settings ({what}); {cure}")


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------
def open_network(checkpoint, **flags):
    """A run, a checkpoint, an export or other people's weights -> (network in eval mode, settings).

    checkpoint: list of a folder or of files. flags: of NETWORK, to take in place of those it was trained with.
    """
    a_run = len(checkpoint) == 1 and not checkpoint[0].startswith(("rgb=", "flow="))
    if a_run and os.path.isfile(checkpoint[0]):
        state = read_state(checkpoint[0])
        a_run = isinstance(state, dict) and state.get("kind") == "checkpoint"
    elif a_run and not os.path.exists(checkpoint[0]):
        raise BadInput(f"--checkpoint {checkpoint[0]} doesn't exist; give a run's folder or a file of weights")
    given = {**dict.fromkeys(NETWORK), **flags}
    return load_network(SimpleNamespace(checkpoint=" ".join(checkpoint), weights=None if a_run else checkpoint,
                                        **given))


def of_views(net, views, flow, checkpoint):
    """The network of `views` alone, by default of all for which there is a network and, for flow, the truth of `flow`.

    Raises BadInput where there isn't.
    """
    views = views or [v for v in net.backbones if v == "rgb" or flow]
    if lacking := [v for v in views if v not in net.backbones]:
        raise BadInput(f"--views {lacking[0]}: {' '.join(checkpoint)} holds a network for "
                       f"{' and '.join(net.backbones)} only")
    if not views or ("flow" in views and not flow):
        raise BadInput("flow needs --flow, the store that flow.py made of these films; or take --views rgb")
    return Backbones({v: net.backbones[v] for v in net.backbones if v in views})


def piece_seconds(store, root, segment):
    """Seconds of a piece: --segment, or those into which flow.py --segment cut long films; None for whole films.

    Raises BadInput where such pieces can't be had of a flow store.
    """
    cut, fps = store.header.get("segment"), store.header.get("fps")
    if cut and segment and segment != cut:
        raise BadInput(f"--flow {root} was made with --segment {cut:g}, so those are the pieces; leave out --segment "
                       f"{segment:g}, make flow of whole films, or take --views rgb")
    if fps and (cut or segment):
        raise BadInput(f"--flow {root} was made with --fps {fps:g}, and an index of pieces needs the flow of films as "
                       f"stored; make that, or take --views rgb")
    return cut or segment


def make_header(net, settings, checkpoint, protocol, store, segment, videos):
    return {"weights": fingerprint(net.backbones), "views": list(net.backbones),
            **{k: settings[k] for k in NETWORK}, "protocol": protocol,
            "flow": store.header if "flow" in net.backbones else None, "segment": segment,
            "videos": os.path.abspath(videos),
            "checkpoint": [_absolute(c) for c in checkpoint]}


def _absolute(file):
    view, path = view_and_path(file)
    return f"{view}=" * bool(view) + os.path.abspath(path)


# ---------------------------------------------------------------------------------------------------------------------
# Films and their pieces
# ---------------------------------------------------------------------------------------------------------------------
class Piece(NamedTuple):
    """A film, or a part of one, of which a feature is to be made."""

    video: Video
    span: tuple  # seconds, as the file declares them
    mark: tuple  # of Collection.marks


def mark_of(path):
    try:
        return tuple(file_stat(path))
    except OSError:
        return 0, 0


def entries_of(held, path):
    """Rows of an index that are of the film at `path`; none where it has changed since, isn't among them, or lacks a
    piece there that could not be read."""
    name = os.path.relpath(os.path.realpath(path), os.path.realpath(held.header["videos"]))
    rows = np.flatnonzero((held.files == name) & (held.marks[:, :2] == mark_of(path)).all(1))
    begins, ends = held.spans[rows].T
    return rows.tolist() if np.allclose(begins, [0, *ends[:-1]][:len(rows)]) else []


def mark_of_flow(store, name):
    """Of all its segments where the film is cut."""
    marks = [mark_of(store.path(own)) for own in ([name] if name in store else store.segments(name))]
    return sum(size for size, _ in marks), max((time for _, time in marks), default=0)


def probe(job, settings, report):
    """(path,) -> (frames, frames a second) as the file declares them; counted where it doesn't. Work of
    `run_in_processes`."""
    path = job[0]
    return film_length(path), declared_fps(path)


def pieces_of(path, name, frames, fps, segment, mark):
    """A film as one Piece, or as consecutive ones of `segment` seconds; a rest below half of that joins the last.

    Raises BadInput where a piece would be less than two frames.
    """
    if not segment:
        return [Piece(Video(path, name, -1), (0.0, frames / fps), mark)]
    if segment * fps < 1.5:
        raise BadInput(f"{path} has {fps:g} frames a second, so that pieces of {segment:g} s are less than two frames; "
                       f"index it with --segment {2 / fps:.3g} or more")
    length = max(2, round(min(segment * fps, frames)))
    starts = [length * i for i in range(max(1, round(frames / length)))]
    ends = [*starts[1:], frames]
    return [Piece(Video(path, name, -1, a, b - a), (a / fps, b / fps), mark)
            for a, b in zip(starts, ends, strict=True)]


def pieces_as_cut(path, name, frames, fps, segment, mark):
    """A film's pieces as flow.py --segment cuts it: the frame at a cut belongs to both."""
    pairs = Settings({"segment": segment}).segment_pairs(fps)
    if frames <= pairs + 1:
        return [Piece(Video(path, name, -1), (0.0, frames / fps), mark)]
    starts = range(0, frames - 1, pairs)
    ends = [*starts[1:], frames]  # in the index the next piece begins where this one ends
    return [Piece(Video(path, name, -1, a, min(pairs + 1, frames - a)), (a / fps, b / fps), mark)
            for a, b in zip(starts, ends, strict=True)]


def pieces_in_store(path, name, store, mark):
    """The pieces of a film that a flow store holds cut, or the film itself. Raises BadInput where it holds neither."""
    pieces = []
    for own in store.segments(name) if name not in store else []:
        flow = store.open(own)
        first, fps, final = (flow.header[k] for k in ("first_frame", "source_fps", "final"))
        end = first + len(flow) + final
        pieces.append(Piece(Video(path, own, -1, first, len(flow) + 1), (first / fps, end / fps), mark))
    if pieces:
        return pieces
    about = store.open(name).header
    return [Piece(Video(path, name, -1), (0.0, about["source_frames"] / about["source_fps"]), mark)]


def find_pieces_in_store(found, marks, store):
    """`find_pieces` of films that flow.py --segment cut; none of them is opened."""
    pieces, faults = [], []
    for file, (name, path) in found.items():
        try:
            pieces += pieces_in_store(path, name, store, marks[file])
        except BadInput as e:
            faults.append(str(e))
    return pieces, faults


def find_pieces(found, marks, segment, time_limit=60):
    """{file: (name, path)} -> ([Piece], [why a film can't be read]); each is opened in a process of its own."""
    pieces, faults = {}, {}
    jobs = {file: (path,) for file, (_, path) in found.items()}
    for file, kind, value in run_in_processes(probe, jobs, None, min(cores(), len(jobs)), time_limit) if jobs else ():
        if kind == "done":
            name, path = found[file]
            try:
                pieces[file] = pieces_of(path, name, *value, segment, marks[file])
            except BadInput as e:
                faults[file] = str(e)
        elif kind != "progress":
            faults[file] = value
    return [p for file in found if file in pieces for p in pieces[file]], [faults[f] for f in found if f in faults]


# ---------------------------------------------------------------------------------------------------------------------
# Making and continuing an index
# ---------------------------------------------------------------------------------------------------------------------
def new_part(out):
    return Path(out).with_name(f".{Path(out).name}.{uuid.uuid4().hex}.npz")


def part_paths(out):
    """Files that `new_part` named."""
    name = re.compile(rf"\.{re.escape(Path(out).name)}\.[0-9a-f]{{32}}\.npz")
    return sorted(path for path in Path(out).parent.iterdir() if name.fullmatch(path.name))


def merge(out, paths, header, marks):
    """The index at `out` and the parts of interrupted work at `paths` -> Collection of what still holds, or None.

    marks: {file: mark} of the films there are. Raises BadInput where any of them is of other weights or settings.
    """
    held = []
    if Path(out).exists():
        held.append(load_collection(out))
        check_header(out, held[0].header, header, "give those, or another --out")
    for path in paths:
        held.append(load_collection(path))
        more = f" and the {len(paths) - 1} more beside it" if len(paths) > 1 else ""
        check_header(path, held[-1].header, header,
                     f"it is interrupted work: give those, or another --out, or delete it{more}")
    newest = {}  # (file, first frame) -> (which, row)
    for which, collection in enumerate(held):
        for row, (key, mark) in enumerate(zip(collection.keys(), collection.marks.tolist(), strict=True)):
            if marks.get(key[0]) == tuple(mark):
                newest[key] = which, row
    chosen = [c.take([row for i, row in newest.values() if i == which]) for which, c in enumerate(held)]
    return join(header, chosen) if newest else None


def join(header, collections):
    columns = (np.concatenate([c[k] for c in collections]) for k in range(1, 5))
    return Collection(header, *columns, {v: np.concatenate([c.values[v] for c in collections])
                                         for v in header["views"]})


def bring_up_to_date(out, header, store):
    """Take what is gone or changed out of the index, and the parts of interrupted work into it -> (Collection or None,
    {file: (name, path)}, {file: mark} of the films there are, what else the folder holds)."""
    root = header["videos"]
    films = find_videos(root)
    found = {os.path.relpath(path, root): (name, path) for name, path in films.items()}
    marks = {file: mark_of(path) + (mark_of_flow(store, name) if header["flow"] else (0, 0))
             for file, (name, path) in found.items()}
    parts = part_paths(out)
    kept = merge(out, parts, header, marks)
    if kept is not None:
        save_collection(out, kept)
    for part in parts:
        part.unlink()
    return kept, found, marks, films.notes()


def survey(out, header, store):
    """What is yet to be done -> ([Piece], keys of what is held, {what: number of films}, [why a film can't be read],
    what else there is)."""
    before = set(load_collection(out).files.tolist()) if Path(out).exists() else set()
    kept, found, marks, notes = bring_up_to_date(out, header, store)
    keys = set(kept.keys()) if kept is not None else set()
    # of which pieces a film consists is known once it was opened
    done = set() if header["segment"] else {file for file, _ in keys}
    left = {file: film for file, film in found.items() if file not in done}
    cut = header["flow"] and header["flow"].get("segment")
    pieces, faults = (find_pieces_in_store(left, marks, store) if cut else
                      find_pieces(left, marks, header["segment"]))
    todo = [p for p in pieces if (os.path.relpath(p.video.path, header["videos"]), p.video.first) not in keys]
    anew = {os.path.relpath(p.video.path, header["videos"]) for p in todo}
    counts = {"new": len(anew - before), "changed": len(anew & before),
              "as before": len(found) - len(anew) - len(faults), "gone": len(before - found.keys())}
    return todo, keys, counts, faults, notes


def extract(net, todo, store, header, out, s, device, rank, world):
    """Features of this process's share of `todo`, kept in parts beside `out` -> (their keys, why some can't be
    read)."""
    keys, said, views, root = [], [], header["views"], header["videos"]

    def keep(b, block):
        pieces = [todo[i] for i in block["kept"]]
        said.extend(block["faults"].tolist())
        if pieces:
            part = Collection(
                header, np.array([os.path.relpath(p.video.path, root) for p in pieces], str),
                np.array([p.span for p in pieces]), np.array([(p.video.first, p.video.frames or 0) for p in pieces]),
                np.array([p.mark for p in pieces]),
                {v: F.normalize(torch.from_numpy(block[v]), dim=1).numpy() for v in views})
            save_collection(new_part(out), part)
            keys.extend(part.keys())

    s = SimpleNamespace(**{k: header[k] for k in (*NETWORK, "protocol")}, workers=s.workers,
                        batch_views=s.batch_views, checkpoint=" ".join(header["checkpoint"]))
    blocks = range(-(-len(todo) // BLOCK))
    extract_blocks(net, [p.video for p in todo], store, s, device, "index", keep,
                   {b for b in blocks if b % world != rank})
    return keys, said


# ---------------------------------------------------------------------------------------------------------------------
# A film that is to be looked up
# ---------------------------------------------------------------------------------------------------------------------
def check_weights(path, header, net, checkpoint):
    """Raise BadInput where an index is of other weights than a network of its views."""
    if fingerprint(net.backbones) != header["weights"]:
        raise BadInput(f"{path} is of other weights than {' '.join(checkpoint)} holds now; index the films anew with "
                       f"these into another --out, or name the index's own with --checkpoint")


def flow_of(film, header, folder):
    """The flow of one film as that of the index was made, but whole -> FlowStore in `folder`, where it is "query"."""
    if header.get("method") == "TV-L1":
        choose_backend(header["backend"])  # says how to build what is lacking
    header = {k: v for k, v in header.items() if k != "segment"}
    Path(folder, "header.json").write_text(json.dumps(header))
    extract_video(Job(film, os.path.join(folder, "query.avi"), None), Settings(header))
    return FlowStore(folder)


@torch.inference_mode()
def features_of(film, net, header, device, batch_views):
    """Unit features of a film that need not be in the index -> ({view: [p, D]} of its p pieces, {what: seconds}, [why
    a piece can't be read], of pieces beside the p).

    net: of some of the views of the index. Raises BadInput where the film can't be read.
    """
    seconds, parts, faults, began = Counter(), [], [], time.perf_counter()

    def lap(what):
        nonlocal began
        now = time.perf_counter()
        seconds[what] += now - began
        began = now

    cut = pieces_as_cut if header["flow"] and header["flow"].get("segment") else pieces_of
    length_and_rate = with_time_limit(QUERY_LIMIT, film, probe, (film,), None, None)
    pieces = cut(film, "query", *length_and_rate, header["segment"], ())
    lap("decoding")
    with temporary_folder() as folder:
        store = None
        if "flow" in net.backbones:
            store = flow_of(film, header["flow"], folder)
            lap("flow")
        views = tuple(net.backbones)
        clips = data.TestClips([p.video for p in pieces], store, views=views,
                               **{k: header[k] for k in ("protocol", "frames", "size", "stride")})
        for i in range(len(pieces)):
            item = clips[i]
            lap("decoding")
            if "fault" in item:
                faults.append(item["fault"])
                continue
            parts.append(mean_over_views(partial(view_features, net, header["protocol"]), [item], views, device,
                                         batch_views))
            lap("network")
    if not parts:
        raise BadInput(faults[0])
    return {v: F.normalize(torch.cat([p[v] for p in parts]), dim=1) for v in views}, seconds, faults
