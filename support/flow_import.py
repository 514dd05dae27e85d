"""python flow.py import: flow that another program left as JPEGs, into a store.

denseflow  DIR/NAME/flow_x_00001.jpg and flow_y_00001.jpg, ... (denseflow, dense_flow, mmaction2's rawframes)
uv         DIR/u/NAME/*.jpg and DIR/v/NAME/*.jpg (the two-stream networks' flow of UCF101 and HMDB51, CoCLR's)

Both write a component of f px as round(255 (f + bound) / (2 bound)), clipped to +-bound. The same inverse here gives
px, which the store keeps in its own 8 bits (stores.quantise, +-20 px). What is gone is gone: a still pixel was stored
as 127 or 128, +-0.08 px at a bound of 20. Sizes stay as they are.
"""

import argparse
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.avi import AviWriter
from support.cli import Help, say
from support.errors import BadInput
from support.files import check_folder
from support.flow_progress import Progress
from support.frame_folders import read_image
from support.stores import BOUND, FlowStore, open_store, quantise, write_list
from support.videos import decode, file_stat, find_videos
from support.worker_pool import cores, run_in_processes

LAYOUTS = {"denseflow": "NAME/flow_x_00001.jpg and flow_y_00001.jpg", "uv": "u/NAME/*.jpg and v/NAME/*.jpg"}
IMAGE = re.compile(r"(.*?)(\d+)\.(jpg|jpeg|png)", re.IGNORECASE)
DENSEFLOW = {"flow_x_": 0, "flow_y_": 1}


class Job(NamedTuple):
    path: str  # folder of the u images
    other: str  # of the v images, which may be the same
    file: str  # to write
    video: str | None  # the video that it is the flow of


class Settings(NamedTuple):
    layout: str
    bound: float
    quality: int


# ---------------------------------------------------------------------------------------------------------------------
# Which images there are
# ---------------------------------------------------------------------------------------------------------------------
def find_flow(root, layout):
    """Folders of flow below `root` -> {name: (folder of u, folder of v)}, sorted by name.

    Raises BadInput where there are none, or a name has u or v only.
    """
    if layout == "denseflow":
        found = {name: (folder, folder) for name, folder in _folders_of_images(root, tuple(DENSEFLOW)).items()}
    else:
        sides = [_folders_of_images(os.path.join(root, side), "") for side in ("u", "v")]
        for name in sorted(sides[0].keys() ^ sides[1].keys()):
            has, lacks = ("u", "v") if name in sides[0] else ("v", "u")
            raise BadInput(f"{os.path.join(root, has, name)} has no {os.path.join(root, lacks, name)} beside it; both "
                           f"components are needed: complete it, or move it elsewhere")
        found = {name: (sides[0][name], sides[1][name]) for name in sides[0]}
    if not found:
        (other,) = LAYOUTS.keys() - {layout}
        raise BadInput(f"--from {root} holds no flow in the layout {layout} ({LAYOUTS[layout]}); is it "
                       f"--layout {other} ({LAYOUTS[other]})?")
    return dict(sorted(found.items()))


def _folders_of_images(root, prefixes):
    """{path below `root`: folder} of those that hold an image whose name begins with one of `prefixes`. Raises BadInput
    where that is `root` itself, which would have no name."""
    found = {os.path.relpath(folder, root): folder for folder, _, files in os.walk(root, followlinks=True)
             if any(IMAGE.fullmatch(f) and f.lower().startswith(prefixes) for f in files)}
    if "." in found:
        raise BadInput(f"{root} holds the flow of one video itself; put it into a folder of the video's name, and give "
                       f"the folder above with --from")
    return found


def numbered(folder, prefix=None):
    """{number: path} of the images of a folder, those whose names begin with `prefix` alone. Raises BadInput where
    two have one number, or a number is missing in between."""
    found = {}
    with os.scandir(folder) as entries:
        for name in sorted(entry.name for entry in entries):
            match = IMAGE.fullmatch(name)
            if not match or (prefix is not None and match[1].lower() != prefix):
                continue
            if (before := found.get(int(match[2]))) is not None:
                raise BadInput(f"{folder} holds {os.path.basename(before)} and {name}, both number {int(match[2])}; "
                               f"remove one")
            found[int(match[2])] = os.path.join(folder, name)
    if found and len(found) != max(found) - min(found) + 1:
        missing = next(n for n in range(min(found), max(found)) if n not in found)
        raise BadInput(f"{folder} has gaps: its {prefix or ''} images run from {min(found)} to {max(found)}, but "
                       f"{missing} is missing; extract it again")
    return found


def components(job, layout):
    """Paths of the u and of the v images of one video, two lists in order. Raises BadInput where they don't match."""
    prefixes = DENSEFLOW if layout == "denseflow" else (None, None)
    u, v = (numbered(folder, prefix) for folder, prefix in zip((job.path, job.other), prefixes, strict=True))
    if u.keys() != v.keys():
        raise BadInput(f"{job.path} holds {len(u)} images of u, but {len(v)} of v{_of(u)} against{_of(v)} "
                       f"({job.other}); extract it again")
    return [u[n] for n in sorted(u)], [v[n] for n in sorted(v)]


def _of(images):
    return f", {min(images)} to {max(images)}" if images else ", none"


# ---------------------------------------------------------------------------------------------------------------------
# One video
# ---------------------------------------------------------------------------------------------------------------------
def dequantised(image, bound):
    """uint8 as denseflow writes it -> float32 px."""
    return image.astype(np.float32) * (2 * bound / 255) - bound


def read_component(path):
    """A component of flow as it was written -> uint8 [h, w]. Raises BadInput where the image is in colour: a picture of
    the flow's direction, or u and v in one image."""
    image = read_image(path)
    if (image[..., :1] != image[..., 1:]).any():
        raise BadInput(f"{path} is in colour; u and v are read from grey images of 8 bits, one each: extract them so")
    return image[..., 0]


def source_of(job, pairs, report):
    """What the file's header says of the source. Raises BadInput if the video has another number of frames."""
    if job.video is None:
        return {"source": os.path.basename(job.path), "source_bytes": images_bytes(job), "source_frames": pairs + 1,
                "source_declared": pairs + 1}
    frames = 0
    for frames, _ in enumerate(decode(job.video), 1):
        if frames % 100 == 0:
            report(0, pairs, 0, 0)  # a sign of life
    if frames != pairs + 1:
        raise BadInput(f"{job.path} holds {pairs} flow fields, but {job.video} has {frames} frames, to which "
                       f"{frames - 1} belong; extract it again from this video (one flow field for each pair of "
                       f"neighbouring frames)")
    return {"source": os.path.basename(job.video), "source_bytes": file_stat(job.video)[0], "source_frames": frames,
            "source_declared": frames}


def images_bytes(job):
    """Bytes of all images of one video."""
    return sum(file_stat(folder)[0] for folder in {job.path, job.other})


def import_video(job, settings, report):
    """Work of `run_in_processes`: one video's images into its file."""
    u, v = components(job, settings.layout)
    header = {**source_of(job, len(u), report), "images_bytes": images_bytes(job), "device": "imported"}
    writer, size = AviWriter(settings.quality), None
    for paths in zip(u, v, strict=True):
        planes = [read_component(path) for path in paths]
        size = size or planes[0].shape
        for plane, path in zip(planes, paths, strict=True):
            if plane.shape != size:
                raise BadInput(f"{path} is {plane.shape[1]}x{plane.shape[0]} px, but {u[0]} is {size[1]}x{size[0]}; "
                               f"the flow of a video has one size: extract it again")
        # the store's 8 bits of [2h, w], u over v
        report(1, len(u), writer.add(quantise(dequantised(np.concatenate(planes), settings.bound))), 0)
    writer.write(job.file, header)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------
def is_imported(store, name, job):
    """Whether a video's file is there, whole, and made of these images (and this video)."""
    try:
        reader = store.open(name)
        reader.check()
        same = reader.header.get("images_bytes") == images_bytes(job)
        return same and (job.video is None or reader.header.get("source_bytes") == file_stat(job.video)[0])
    except (BadInput, OSError):
        return False


def import_flow(args):
    """Write what the store lacks -> exit status."""
    if not 0 < args.bound <= 1000:
        raise BadInput(f"--bound takes the px at which the images were clipped, up to 1000, not {args.bound}")
    if not os.path.isdir(args.source):
        raise BadInput(f"--from {args.source} is no folder")
    if args.workers < 1:
        raise BadInput(f"--workers takes 1 or more, not {args.workers}")
    source, out = (Path(os.path.realpath(folder)) for folder in (args.source, args.out))
    if out.is_relative_to(source) or source.is_relative_to(out):
        raise BadInput(f"--out {args.out} and --from {args.source} lie in one another; choose folders apart")
    found = find_flow(args.source, args.layout)
    videos = find_videos(args.videos) if args.videos else {}
    without = [name for name in found if videos and name not in videos]
    store = open_store(FlowStore, args.out, {
        "method": f"imported from {args.layout}", "backend": args.layout, "imported_bound": args.bound, "bound": BOUND,
        "quality": args.quality})
    jobs = {name: Job(*folders, os.path.join(args.out, f"{name}.avi"), videos.get(name))
            for name, folders in found.items() if name not in without}
    jobs = {name: job for name, job in jobs.items() if not is_imported(store, name, job)}
    if jobs:
        check_folder(store.root, "--out")
    say(f"{len(found)} videos with flow below {args.source}, {len(jobs)} to do",
        *(videos.notes() if args.videos else ()))
    skipped, progress = {}, Progress(len(jobs), args.workers)
    for name, kind, value in run_in_processes(import_video, jobs, Settings(args.layout, args.bound, args.quality),
                                              args.workers, args.time_limit):
        if kind == "progress":
            progress.add(name, *value)
        else:
            progress.videos += 1
            if kind != "done":
                skipped[name] = value
        progress.show()
    progress.bar.close()
    written = len(jobs) - len(skipped)
    skipped |= {name: f"{found[name][0]} has no video of that name below {args.videos}" for name in without}
    write_list(store.root / "skipped.json", {"skipped": dict(sorted(skipped.items())), "cut short": {}})
    lacking = [name for name in videos if name not in found]
    say(f"{written} videos written; {len(skipped)} skipped",
        *(f"skipped: {message}" for message in sorted(skipped.values())),
        *([f"{len(lacking)} videos below {args.videos} have no flow below {args.source}: {', '.join(lacking[:10])}"
           f"{', ...' if len(lacking) > 10 else ''}"] if lacking else []))
    if len(skipped) == len(found):
        raise BadInput(f"none of the {len(found)} videos with flow below {args.source} can be used; "
                       f"{store.root / 'skipped.json'} says why")
    return int(args.strict and bool(skipped or lacking))


def import_arguments():
    """The parser of the command."""
    p = argparse.ArgumentParser(prog="flow.py import", formatter_class=Help,
                                description="Flow that another program left as JPEGs, into a store.")
    p.add_argument("--from", dest="source", required=True, metavar="DIR", help="folder of the images")
    p.add_argument("--out", required=True, help="the flow store: a new folder, or one to continue")
    p.add_argument("--layout", choices=LAYOUTS, required=True,
                   help="; ".join(f"{layout}: {files}" for layout, files in LAYOUTS.items()))
    p.add_argument("--bound", type=float, default=20.0, help="px at which it was clipped (default 20)")
    p.add_argument("--videos", help="folder of the videos: hold the counts to them, and name those that don't fit")
    p.add_argument("--quality", type=int, default=95, choices=range(1, 101), metavar="Q", help="of the JPEGs")
    p.add_argument("--workers", type=int, default=cores(), help="processes (default: one a core)")
    p.add_argument("--time-limit", type=float, default=600, help="seconds without a flow field, then it is skipped")
    p.add_argument("--strict", action="store_true", help="exit status 1 if a video was skipped or has no flow")
    return p
