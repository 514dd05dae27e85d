"""Stage 1: optical flow of a folder of videos (paper section 4: "computed using the TV-L1 algorithm [92]").

In   a folder of videos (files, or folders of images), any layout below it; each is read once, made grey and resized to
     a short side of 256 px.
Out  STORE/header.json   every setting, the OpenCV version among them; a store never mixes settings
     STORE/<name>.avi    the n-1 flow fields of a video of n frames, u over v as one grey picture [2h, w] that players
                         show: clipped to +-20 px, 8 bit, 128 is 0, JPEG. <name> is the video's path without suffix
     STORE/skipped.json  what gave no flow, or less than its file declares, and why; absent where there is none
     RGB/...             with --rgb RGB, the n frames themselves at 190 px, from the same pass (stores.RgbStore)

    python flow.py --videos DIR --out STORE [--rgb RGB]        # again continues, after any interruption
    python flow.py --videos DIR --out STORE --plan             # how long it will take and how large it will be
    python flow.py --videos DIR --out STORE --shard 3/20       # the third of twenty machines
    torchrun --nproc-per-node 8 flow.py --videos DIR --out STORE      # a GPU each
    python flow.py --videos DIR --out STORE --rgb RGB --segment 60    # hours of film: a sample of each minute
    python flow.py info STORE --videos DIR --video NAME --picture FILE.png
    python flow.py import --from DIR --out STORE --layout denseflow   # flow that exists as JPEGs

--segment SECONDS: a longer video becomes consecutive files <name>@<first frame>.avi, each written once it is done:
memory stays that of one, and an interrupted hour goes on where it was. The pair across a cut belongs to the earlier
file, so that all pairs are there once; the last may be shorter. --fps F: frames at F a second, by their time stamps, so
that videos of different rates have clips of equal duration. Training then reads pictures from the RGB store, because
frame numbers are no longer those of the video. Both are in the header.

--method: tvl1, the paper's, or OpenCV's faster dis and farneback, which are other flows. --backend goca is this
project's TV-L1 (tvl1.py, compiled), opencv is cv2.optflow's; auto takes goca where that is built and agrees with OpenCV
on a generated pair. The header says which; a store has one. --device auto takes a GPU where the CUDA kernels are built
and agree with the CPU.

Time: some 0.08 s a pair of UCF101 on a core, by content, up to four times that on a busy one (2.4 million pairs: 50 to
210 core-hours, 13 GB); with opencv more than ten times as much. `--warps 1 --epsilon 0.03` is several times as fast and
0.08 px away on average: for trials.

The paper gives neither parameters nor resolution: these are OpenCV's defaults and the usual 256 px. u and v stay in
pixels of the store's resolution. The methods: support/flow_methods.py; from files to stores:
support/flow_pipeline.py.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import numpy as np

from support.cli import Help, command_line, say
from support.errors import BadInput
from support.files import check_folder, temporary_folder
from support.flow_gpu import BATCH_PAIRS, extract_batched
from support.flow_import import import_arguments, import_flow
from support.flow_info import info
from support.flow_methods import FLOW_METHODS, TVL1, choose_device, make_settings
from support.flow_pipeline import Job, Settings, cut_short_message, extract_in_worker, long_message
from support.flow_progress import Progress, note
from support.stores import SEGMENT, FlowStore, RgbStore, open_store, rgb_settings, write_list
from support.videos import file_stat, find_videos, with_time_limit
from support.worker_pool import cores, run_in_processes


# ---------------------------------------------------------------------------------------------------------------------
# Jobs
# ---------------------------------------------------------------------------------------------------------------------
def finished_header(store, name, path):
    """The header of a video's file, or of its last segment, if all of it is in the store, whole (`AviReader.check`),
    and made from the video as it is now; else None."""
    try:
        size, following = file_stat(path)[0], 0
        if name in store:
            reader = store.open(name)
            reader.check()
            if reader.header.get("source_bytes") == size:
                return reader.header
        for segment in store.segments(name):
            reader = store.open(segment)
            reader.check()
            if (reader.header.get("source_bytes"), reader.header.get("first_frame")) != (size, following):
                return None
            following += len(reader) - (store.KIND == "rgb")
        return reader.header if following and reader.header.get("final") else None
    except (BadInput, OSError):
        return None


def remove_outdated(store, name, path):
    """Remove the files of a video that were made from it as it was once: it may now be cut in another way."""
    with suppress(OSError):
        size = file_stat(path)[0]
        for file in [name, *store.segments(name)]:
            with suppress(BadInput):
                if file in store and store.open(file).header.get("source_bytes") != size:
                    store.path(file).unlink()


class Remarks:
    """Messages on videos that are used, {name: message}: cut short, or long and not cut into segments."""

    def __init__(self, segments):
        self.cut, self.long, self.segments = {}, {}, segments

    def add(self, name, path, about):
        """about: the header of the video's last file."""
        if message := cut_short_message(path, about):
            self.cut[name] = message
        if not self.segments and (message := long_message(path, about["source_frames"])):
            self.long[name] = message


def missing_jobs(found, stores, roots, remarks):
    """What is yet to be made of `found`, {name: path} -> ({name: Job}, {name: message} of links that lead nowhere);
    `remarks` on the others.

    stores: of flow and of RGB, None where there is none yet; roots: their folders, None where none is wanted.
    """
    def look(item):
        name, path = item
        there = [store and finished_header(store, name, path) for store in stores]
        return there, not all(there) and os.path.islink(path) and not os.path.exists(path)

    jobs, absent, items = {}, {}, list(found.items())
    with ThreadPoolExecutor(16) as pool:  # they wait for the disk; of all at once the futures alone take much memory
        looked = (result for k in range(0, len(items), 4096) for result in pool.map(look, items[k:k + 4096]))
        for (name, path), (there, dangling) in zip(items, looked, strict=True):
            files = [os.path.join(root, f"{name}.avi") if root and not about else None
                     for root, about in zip(roots, there, strict=True)]
            if any(files) and dangling:
                absent[name] = f"{path} doesn't exist"
            elif any(files):
                jobs[name] = Job(path, *files)
            else:
                remarks.add(name, path, there[0])
    return jobs, absent


# ---------------------------------------------------------------------------------------------------------------------
# Many videos
# ---------------------------------------------------------------------------------------------------------------------
def share(jobs, parts):
    """Each job for so many processes, of which each does a part of its segments -> {(name, part): Job}."""
    return {(name, i): job._replace(part=(i, parts)) for name, job in jobs.items() for i in range(parts)}


def extract_all(jobs, settings, workers, progress, remarks, time_limit=600, device=None, batch=BATCH_PAIRS,
                videos=None):
    """Work through `jobs`, {name: Job} -> {name: why skipped}; `remarks` on the others.

    time_limit: seconds for one pair (with a device: for decoding 32), before the video is skipped.
    device: None, and each process computes flow itself on the CPU; else batches of pairs go there. videos: the folder
    where all of them are.
    Raises BadInput as soon as a store can't be written or `videos` is gone, and as `run_in_processes` and
    `extract_batched`.
    """
    # of fewer videos than processes each is decoded by several, which compute the flow of different segments
    parts = max(1, workers // max(1, len(jobs))) if settings.cuts and device is None and not settings.limit else 1
    skipped, left, warned, progress.parts = {}, dict.fromkeys(jobs, parts), set(), parts
    if device is None:
        events = run_in_processes(extract_in_worker, share(jobs, parts), settings, workers, time_limit)
    else:
        events = extract_batched(share(jobs, parts), settings, workers, time_limit, device, batch)
    for (name, part), kind, value in events:
        if kind == "progress":
            progress.add((name, part), *value)
            if not settings.cuts and name not in warned and (message := long_message(jobs[name].path, value[1] + 1)):
                warned.add(name)
                note(message)
        else:
            left[name] -= 1
            progress.videos += left[name] == 0
            if kind == "unavailable" and videos and not with_time_limit(10, videos, os.path.isdir, videos):
                raise BadInput(f"--videos {videos} is no longer a folder; see whether its disk is there, the same "
                               f"command continues")
            if kind in ("failed", "unavailable"):
                skipped[name] = value
            elif left[name] == 0 and name not in skipped and settings.limit is None:
                remarks.add(name, jobs[name].path, value)
        progress.show()
    progress.bar.close()
    return skipped


def plan(jobs, settings, workers, time_limit, device, batch, videos):
    """Time the first pairs of some videos, as the run would do them, and print what all of `jobs` will take."""
    names = list(jobs)
    count = min(len(names), max(24, 2 * workers))
    sample = [names[k * len(names) // count] for k in range(count)]
    with temporary_folder() as folder:
        some = {name: Job(jobs[name].path, *(file and os.path.join(folder, f"{k}-{what}.avi") for what, file in
                                             zip(("flow", "rgb"), jobs[name][1:3], strict=True)))
                for k, name in enumerate(sample)}
        progress = Progress(count, workers)
        skipped = extract_all(some, settings._replace(limit=65 if device else 5), workers, progress,
                              Remarks(settings.cuts), time_limit, device, batch, videos)
    if len(skipped) == count:
        raise BadInput(f"none of {count} videos gave flow, the first because {skipped[sample[0]]}")
    usable = len(names) * (1 - len(skipped) / count)
    pairs, flow, rgb = progress.estimate(usable)
    counts = list(progress.expected.values())
    deviation = np.std(counts, ddof=1) / math.sqrt(len(counts)) / np.mean(counts) if len(counts) > 1 else 1.0
    duration = timedelta(seconds=round(pairs / progress.rate()))
    say(f"{count} videos tried: {progress.pairs} pairs, {progress.rate():.1f} pairs/s in {workers} processes"
        f"{f', {len(skipped)} videos can not be used' if skipped else ''}",
        f"{len(names)} videos to do: some {pairs:.3g} pairs (+-{100 * deviation:.0f} %, from the lengths of "
        f"{len(counts)}), {duration}, {flow / 1e9:.3g} GB of flow"
        f"{f', {rgb / 1e9:.3g} GB of RGB' if settings.rgb else ''}; nothing was written")


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------
def parse_shard(shard):
    """--shard i/n, and the processes of torchrun within it -> (i, n) of all parts."""
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise BadInput(f"--shard takes i/n with 1 <= i <= n, such as 2/8, not {shard}")
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    return (i - 1) * world + rank + 1, n * world


def check_apart(found, videos, out, rgb):
    """Raise BadInput if a store could hold one of the videos, `found` below the folder `videos`, or be among them."""
    folders = {**({"--rgb": rgb} if rgb else {}), "--out": out, "--videos": videos}
    places = {option: Path(os.path.realpath(folder)) for option, folder in folders.items()}
    for (a, folder), (b, other) in itertools.permutations(places.items(), 2):
        if folder.is_relative_to(other):
            where = f"is {b} too" if folder == other else f"is inside {b} {folders[b]}"
            raise BadInput(f"{a} {folders[a]} {where}; files of one could replace, or be taken for, those of the "
                           f"other: choose folders apart")
    for folder in {os.path.dirname(path) for path in found.values()}:
        for option in places.keys() - {"--videos"}:
            if Path(os.path.realpath(folder)).is_relative_to(places[option]):  # by a link
                raise BadInput(f"{folder} leads into {option} {folders[option]}, where its videos could be "
                               f"replaced; choose another {option}")


def check_names(found):
    """Raise BadInput if a video has the name of another's segment."""
    for name, path in found.items():
        if (match := SEGMENT.fullmatch(f"{name}.avi")) and match[1] in found:
            raise BadInput(f"{path} has the name of a segment of {found[match[1]]} (--segment); rename it")


def write_listing(root, i, n, skipped, cut, names, found):
    """Write what was skipped and cut short of shard i of n, the videos `names`, to the folder `root` of the store, and
    leave out of the lists of other divisions what is in this one, or not in `found` -> the list's path."""
    def name(i, n):
        return f"skipped-{i}-of-{n}.json" if n > 1 else "skipped.json"

    listing, here = root / name(i, n), set(names)
    lists = {listing: {"skipped": skipped, "cut short": cut}}
    others = {p for p in root.glob("skipped*.json") if re.fullmatch(r"skipped(-\d+-of-\d+)?\.json", p.name)}
    for other in others - {root / name(k, n) for k in range(1, n + 1)}:
        lists[other] = {}
        with suppress(OSError, ValueError, AttributeError):  # damaged
            lists[other] = {kind: {k: why for k, why in messages.items() if k in found and k not in here}
                            for kind, messages in json.loads(other.read_text()).items()}
    for path, content in lists.items():
        write_list(path, content)
    return listing


def check_stores(stores, jobs):
    """Raise BadInput where one can't be written, unless all of `jobs` were skipped before: a finished store may lie
    where nothing can be written."""
    skipped = set()
    for path in stores[0].root.glob("skipped*.json"):
        with suppress(OSError, ValueError, AttributeError, KeyError, TypeError):  # damaged
            skipped |= json.loads(path.read_text())["skipped"].keys()
    for store, option in zip(stores, ("--out", "--rgb"), strict=True):
        if store and jobs.keys() - skipped:
            check_folder(store.root, option)


def settings_of(args):
    """What the command asks for -> Settings. Raises BadInput where options do not go together."""
    for option, least, most in [("workers", 1, 4096), ("time_limit", 1, 86400), ("short_side", 0, 4096),
                                ("quality", 1, 100), ("warps", 1, 100), ("epsilon", 0, 1), ("rgb_side", 16, 4096),
                                ("batch", 0, 65536), ("segment", 0, 86400), ("fps", 0, 240)]:
        if not least <= getattr(args, option) <= most:
            raise BadInput(f"--{option.replace('_', '-')} takes {least} to {most}, not {getattr(args, option)}")
    params = {"WarpingsNumber": args.warps, "Epsilon": args.epsilon}
    if args.method != "tvl1":
        if params != {name: TVL1[name] for name in params}:
            raise BadInput(f"--warps and --epsilon are of --method tvl1; {args.method} has neither")
        params = {}
    backend = args.backend
    if backend == "auto" and os.path.isfile(os.path.join(args.out, "header.json")):  # a store goes on as it began
        backend = FlowStore(args.out).header.get("backend", "auto") if args.method == "tvl1" else "auto"
    # absent where 0, as in the headers of earlier versions
    cuts = {key: value for key, value in (("segment", args.segment), ("fps", args.fps)) if value}
    return Settings({**make_settings(args.short_side, args.quality, backend, args.method, **params), **cuts},
                    {**rgb_settings(args.rgb_side), **cuts} if args.rgb else None)


def open_stores(args, settings):
    """-> [FlowStore, RgbStore], new or continued; None for what isn't asked for, or isn't there yet where --plan is."""
    stores = []
    for kind, root, header, option in ((FlowStore, args.out, settings.flow, "--out"),
                                       (RgbStore, args.rgb, settings.rgb, "--rgb")):
        there = root and (not args.plan or os.path.isfile(os.path.join(root, "header.json")))
        stores.append(open_store(kind, root, header, option) if there else None)
    return stores


def report(args, written, progress, skipped, cut, long):
    """Print what a run did: jobs written, and messages on the videos skipped, cut short and long."""
    each = f" (flow of {sum(bool(j.flow) for j in written)}, RGB of {sum(bool(j.rgb) for j in written)})"
    rate = progress.rate() * progress.computed / max(1, progress.pairs)
    speed = f", {progress.computed} pairs, {rate:.1f} pairs/s in {args.workers} processes"
    say(f"{len(written)} videos written{each if args.rgb else ''}{speed if progress.computed else ''}; "
        f"{len(skipped)} skipped, {len(cut)} cut short",
        *(f"skipped: {message}" for message in skipped.values()),
        *(f"used, but: {message}" for message in [*cut.values(), *long.values()]))


def run(args):
    """Extract what the stores lack -> exit status."""
    i, n = parse_shard(args.shard)
    settings = settings_of(args)
    if args.strict and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise BadInput("--strict doesn't go with torchrun, which ends all processes when one leaves with status "
                       "1; run flow.py --strict by itself afterwards, it computes nothing twice")
    device, why = choose_device(args.device, settings.flow, int(os.environ.get("LOCAL_RANK", 0)))
    batch = args.batch or (BATCH_PAIRS if device.type == "cuda" else 0)
    found = find_videos(args.videos)
    check_apart(found, args.videos, args.out, args.rgb)
    if args.segment:
        check_names(found)
    names = list(found)[i - 1::n]
    say(f"{len(found)} videos below {args.videos}, {len(names)} of them in shard {i}/{n}; looking at the store",
        *found.notes())
    stores, remarks = open_stores(args, settings), Remarks(settings.cuts)
    jobs, absent = missing_jobs({name: found[name] for name in names}, stores, (args.out, args.rgb), remarks)
    say(f"{len(jobs)} to do; {settings.flow['method']} of {settings.flow['backend']} on {device}"
        f"{f', {batch} pairs at once' if batch else ''}, short side {args.short_side or 'as it is'}"
        f"{f'; no GPU is used: {why}' if why else ''}")
    how = args.time_limit, device if batch else None, batch, args.videos
    if args.plan:
        if jobs:
            plan(jobs, settings, args.workers, *how)
        return 0

    check_stores(stores, jobs)
    for name, job in jobs.items() if settings.cuts else ():
        for store in filter(None, stores):
            remove_outdated(store, name, job.path)
    progress = Progress(len(jobs), args.workers)
    skipped = extract_all(jobs, settings, args.workers, progress, remarks, *how)
    skipped, cut = dict(sorted((skipped | absent).items())), dict(sorted(remarks.cut.items()))
    listing = write_listing(stores[0].root, i, n, skipped, cut, names, found)
    report(args, [job for name, job in jobs.items() if name not in skipped], progress, skipped, cut, remarks.long)
    if len(skipped) == len(found):
        raise BadInput(f"none of the {len(found)} videos below {args.videos} gave flow; {listing} says why")
    return int(args.strict and bool(skipped or cut))


def main(argv=None):
    """The command -> exit status: 0, or with --strict 1 if videos were skipped or cut short. Raises BadInput."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["info"]:
        p = argparse.ArgumentParser(prog="flow.py info", description=info.__doc__)
        p.add_argument("store", help="folder that flow.py --out or --rgb made")
        p.add_argument("--videos", help="folder of videos: list those without flow; draw the frame beside its flow")
        p.add_argument("--video", help="name of the video to draw (its path below --videos without suffix)")
        p.add_argument("--picture", help="picture to write, such as flow.png")
        p.add_argument("--check", action="store_true", help="read every frame, not only where each begins")
        return info(p.parse_args(argv[1:]))
    if argv[:1] == ["import"]:
        return import_flow(import_arguments().parse_args(argv[1:]))
    own = max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    p = argparse.ArgumentParser(prog="flow.py", description="Optical flow (TV-L1) of a folder of videos.",
                                formatter_class=Help,
                                epilog="flow.py info STORE says what a store holds, flow.py import takes flow that "
                                       "exists (flow.py info --help, flow.py import --help).")
    p.add_argument("--videos", required=True, help="folder of videos, searched with all below it")
    p.add_argument("--out", required=True, help="the flow store: a new folder, or one to continue")
    p.add_argument("--rgb", help="write the frames too, at training size: an RGB store, new or to continue")
    p.add_argument("--rgb-side", type=int, default=190, help="short side of those, at most (default 190)")
    p.add_argument("--plan", action="store_true", help="time some pairs, say how long and how large all is, and leave")
    p.add_argument("--workers", type=int, default=own, help="processes, of one thread each (default: one a core)")
    p.add_argument("--time-limit", type=float, default=600, help="seconds for one pair, then the video is skipped")
    p.add_argument("--shard", default="1/1", metavar="i/n", help="do the i-th of n parts, for n machines on one store")
    p.add_argument("--segment", type=float, default=0, metavar="SECONDS",
                   help="cut longer videos into consecutive pieces of this length, each a file and a sample; training "
                        "then needs --rgb (default 0: no)")
    p.add_argument("--fps", type=float, default=0,
                   help="frames a second, by time stamps; training then needs --rgb (default 0: as stored)")
    p.add_argument("--short-side", type=int, default=256, help="short side in px; 0: as it is (default 256)")
    p.add_argument("--quality", type=int, default=95, help="JPEG quality of the flow (default 95)")
    p.add_argument("--method", choices=FLOW_METHODS, default="tvl1",
                   help="dis and farneback are faster and another flow")
    p.add_argument("--warps", type=int, default=TVL1["WarpingsNumber"], help="warps a scale (default 5)")
    p.add_argument("--epsilon", type=float, default=TVL1["Epsilon"], help="when iterations stop (default 0.01)")
    p.add_argument("--backend", choices=["auto", "goca", "opencv"], default="auto",
                   help="what computes: this project's operator, OpenCV, or the first where it agrees with the second")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                   help="auto: a GPU where there is one, the CUDA kernels are built and agree with the CPU")
    p.add_argument("--batch", type=int, default=0,
                   help=f"pairs computed at once (default {BATCH_PAIRS} on a GPU; on a CPU each process does its own)")
    p.add_argument("--strict", action="store_true", help="exit status 1 if a video was skipped or cut short")
    return run(p.parse_args(argv))


if __name__ == "__main__":
    command_line(main)
