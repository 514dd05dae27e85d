"""Stage 1: optical flow of a folder of videos (paper section 4: "computed using the TV-L1 algorithm [92]").

In   a folder of videos, any layout below it; each is read once, made grey and resized to a short side of 256 px.
Out  STORE/header.json   every setting, the OpenCV version among them; a store never mixes settings
     STORE/<name>.avi    the n-1 flow fields of a video of n frames, u over v as one grey picture [2h, w] that players
                         show: clipped to +-20 px, 8 bit, 128 is 0, JPEG. <name> is the video's path without suffix
     STORE/skipped.json  what gave no flow, or less than its file declares, and why; absent where all is well

    python flow.py --videos DIR --out STORE                    # again continues, after any interruption
    python flow.py --videos DIR --out STORE --shard 3/20       # the third of twenty machines
    python flow.py info STORE --videos DIR --video NAME --picture FILE.png

--backend goca is this project's TV-L1 (tvl1.py, compiled), opencv is cv2.optflow's; auto takes goca where that is built
and agrees with OpenCV on a generated pair. The header says which; a store has one.

Time: some 0.15 to 0.4 s a pair of UCF101 on a busy core, by content (2.4 million pairs: 210 core-hours, 11 GB); with
opencv ten times as much. `--warps 1 --epsilon 0.03` is several times as fast and 0.08 px away on average: for trials.

The paper gives neither parameters nor resolution: these are OpenCV's defaults and the usual 256 px. u and v stay in
pixels of the store's resolution.
"""

import argparse
import itertools
import json
import math
import os
import re
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import cv2
import numpy as np
import torch

import data
import goca
import tvl1
from workers import cores, in_processes

# OpenCV's defaults, by the names of its setters. Zach, Pock, Bischof (2007): Lambda weighs the data term, Theta couples
# u with its auxiliary v, Tau is the step of the dual ascent; most others say where to stop.
TVL1 = {"Tau": 0.25, "Lambda": 0.15, "Theta": 0.3, "ScalesNumber": 5, "ScaleStep": 0.8, "WarpingsNumber": 5,
        "Epsilon": 0.01, "InnerIterations": 30, "OuterIterations": 10, "MedianFiltering": 5, "Gamma": 0.0}
OURS = {"Tau": "tau", "Lambda": "lam", "Theta": "theta", "ScalesNumber": "scales", "ScaleStep": "scale_step",
        "WarpingsNumber": "warps", "Epsilon": "epsilon", "InnerIterations": "inner", "OuterIterations": "outer",
        "MedianFiltering": "median"}  # names in tvl1.py, which has no Gamma
AGREE = 0.02  # px, mean end-point distance


def agrees(**params):
    """Whether both backends give the same flow of a generated pair: a smooth texture that turns and grows a little."""
    noise = np.random.default_rng(0).normal(size=(64, 80)).astype(np.float32)
    first = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    second = cv2.warpAffine(first, cv2.getRotationMatrix2D((40, 32), 2, 1.02), (80, 64), borderMode=cv2.BORDER_REFLECT)
    (ours,), (theirs,) = (fields([first, second], backend, **params) for backend in ("goca", "opencv"))
    return np.linalg.norm(ours - theirs, axis=-1).mean() < AGREE


def choose_backend(backend="auto", **params):
    """"auto", "goca" or "opencv" -> the latter two. Raises BadInput, with the cure, where it is not there."""
    if backend != "opencv" and goca._goca is None:
        if backend == "goca":
            raise data.BadInput(f"--backend goca needs the extension; build it with: {goca.BUILD}")
        backend = "opencv"
    if backend != "goca" and not hasattr(getattr(cv2, "optflow", None), "DualTVL1OpticalFlow_create"):
        raise data.BadInput(
            f"OpenCV {cv2.__version__} has no cv2.optflow: opencv-python was installed over opencv-contrib-python "
            f"(both use one folder); mend it with: pip uninstall -y opencv-python opencv-python-headless "
            f"opencv-contrib-python opencv-contrib-python-headless && pip install opencv-contrib-python; "
            f"or take --backend goca, which does without")
    if backend == "auto":
        backend = "goca" if agrees(**params) else "opencv"
    return backend


def make_settings(short_side=256, quality=95, backend="auto", **params):
    """All that decides the bytes of a store -> dict, the store's header. params: entries of TVL1 to change.

    Raises BadInput, with the cure, where the backend is not there.
    """
    return {"method": "TV-L1", "backend": choose_backend(backend, **params), "opencv": cv2.__version__,
            "short_side": short_side, "resize": "grey, then area to shrink or bilinear to enlarge",
            "bound": data.BOUND, "quality": quality, **TVL1, **params}


# ---------------------------------------------------------------------------------------------------------------------
# One video
# ---------------------------------------------------------------------------------------------------------------------
def fields(frames, backend, **params):
    """TV-L1 flow of consecutive frames [92].

    frames: iterable of uint8 [H, W]. backend: "goca" or "opencv". params: entries of TVL1 to change.
    Yields float32 [H, W, 2] for each pair: (u, v) in pixels to the right and down, from its first frame to its second.
    """
    params = {**TVL1, **params}
    if backend == "goca":
        ours = {name: params[theirs] for theirs, name in OURS.items()}

        def pair(a, b):
            both = torch.from_numpy(np.stack([a, b]))[None]
            return tvl1.flow(both, impl="compiled", **ours)[0, 0].permute(1, 2, 0).numpy()
    else:
        solver = cv2.optflow.DualTVL1OpticalFlow_create()
        for name, value in params.items():
            getattr(solver, f"set{name}")(value)

        def pair(a, b):
            return solver.calc(a, b, None)
    for a, b in itertools.pairwise(frames):
        yield pair(a, b)


def grey_frames(path, short_side, about):
    """Yield the frames of a video grey, uint8 [h, w], the short side `short_side` px (0: as it is).

    about: a dict that is filled with the size of the frames, how many the file declares, and how many came so far.
    Raises BadInput, naming the file, if it can't be read or changes its size.
    """
    about["source_frames"] = 0
    for frame in data.decode(path):
        h, w = frame.shape[:2]
        if about["source_frames"] == 0:
            about["source_size"] = [w, h]
            declared = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG).get(cv2.CAP_PROP_FRAME_COUNT)
            about["source_declared"] = max(0, int(declared))
        elif about["source_size"] != [w, h]:
            raise data.BadInput(f"{path} changes its size from {about['source_size']} to {[w, h]} at frame "
                                f"{about['source_frames']}; cut it there into two videos")
        about["source_frames"] += 1
        grey = cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY)
        scale = short_side / min(h, w) if short_side else 1
        if scale != 1:
            how = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
            grey = cv2.resize(grey, (round(w * scale), round(h * scale)), interpolation=how)
        yield grey


def extract(path, out, settings, tell=None):
    """Write the flow of one video to `out` in the store's format (data.write_avi) -> the file's own header, a dict.

    settings: of `make_settings`. tell(about, plane): called for each pair with the header so far and its u over v.
    Raises BadInput, naming the file, if it can't be read, has one frame only, or `out` can't be written.
    """
    about = {"source": os.path.basename(path)}

    def planes():
        frames = grey_frames(path, settings["short_side"], about)
        params = {name: settings[name] for name in TVL1}
        for flow in fields(frames, settings["backend"], **params):  # [h, w, 2]
            plane = data.quantise(np.concatenate([flow[..., 0], flow[..., 1]]))  # [2h, w]
            if tell:
                tell(about, plane)
            yield plane
        if about["source_frames"] == 1:
            raise data.BadInput(f"{path} has one frame only; flow needs two")
        about["source_bytes"] = os.path.getsize(path)

    data.write_avi(out, planes(), about, quality=settings["quality"])  # looks into `about` after the last plane
    return about


def cut_short(path, about):
    """A sentence if fewer frames decode than the file declares, else None; declarations are loose: 5 % may lack."""
    n, declared = about["source_frames"], about["source_declared"]
    return f"{path} is cut short: {n} of {declared} frames decode" if n < 0.95 * declared else None


# ---------------------------------------------------------------------------------------------------------------------
# Many videos
# ---------------------------------------------------------------------------------------------------------------------
def work(job, settings, tell):
    """Work of `workers.in_processes`: (path, out) -> the sentence of `cut_short`; tells what `Progress.pair` takes."""
    path, out = job
    torch.set_num_threads(1)
    size = 0

    def pair(about, plane):
        nonlocal size
        if about["source_frames"] == 2:
            size = len(cv2.imencode(".jpg", plane, [cv2.IMWRITE_JPEG_QUALITY, settings["quality"]])[1])
        tell(max(about["source_frames"], about["source_declared"]) - 1, size)

    return cut_short(path, extract(path, out, settings, pair))


def extract_all(jobs, settings, workers, progress, time_limit=600):
    """Work through `jobs`, {name: (path, out)}, in processes of one thread -> ({name: why skipped}, {name: cut short}).

    time_limit: seconds for one pair, before the video is skipped.
    Raises BadInput as soon as the store can't be written.
    """
    skipped, cut = {}, {}
    for name, kind, value in in_processes(work, jobs, settings, workers, time_limit):
        if kind == "told":
            progress.pair(name, *value)
        else:
            progress.videos += 1
            if kind == "failed":
                skipped[name] = value
            elif value:
                cut[name] = value
        progress.show()
    return skipped, cut


class Progress:
    """A line of counts, pairs a second and estimates: rewritten on a terminal, else after 10 s and then every 30 s."""

    def __init__(self, total):
        self.total, self.videos, self.pairs, self.expected = total, 0, 0, {}
        self.terminal = sys.stdout.isatty()
        self.start = self.next = math.inf

    def pair(self, name, expected, size):
        """One more pair of video `name`, which has about `expected`, each of about `size` bytes."""
        self.pairs += 1
        self.expected[name] = expected, size
        if self.pairs == 1:  # the clock leaves out the start of the processes
            self.start = time.monotonic()
            self.next = self.start + (0.5 if self.terminal else 10)

    def rate(self):
        return (self.pairs - 1) / (time.monotonic() - self.start) if self.pairs > 1 else 0.0

    def show(self):
        now = time.monotonic()
        if now < self.next or self.pairs < 2:
            return
        self.next = now + (0.5 if self.terminal else 30)
        expected, size = np.mean(list(self.expected.values()), axis=0)
        expected, rate = max(self.pairs, expected * self.total), self.rate()
        left = timedelta(seconds=round((expected - self.pairs) / rate))
        line = (f"{self.videos} of {self.total} videos, {self.pairs} of some {expected:.0f} pairs, {rate:.1f} pairs/s, "
                f"{left} left, {expected * size / 1e6:.0f} MB in the end")
        print(f"\r\033[K{line}" if self.terminal else line, end="" if self.terminal else "\n", flush=True)


def open_store(root, settings):
    """Make the folder of a store with its header, or hold `settings` to the header that is there -> data.FlowStore.

    Raises BadInput if the folder holds something else or was made with other settings.
    """
    root, header = Path(root), {"kind": "flow", "version": 1, **settings}
    try:
        inside = [p.name for p in root.iterdir() if not p.name.startswith(".tmp-")] if root.exists() else []
    except OSError as e:
        raise data.BadInput(f"--out {root} can't be used as a folder ({e.strerror}); choose another") from e
    if not inside:  # of shards that start together one writes the header, and the others are held to it
        with suppress(FileExistsError), data.atomic(root / "header.json", exclusive=True) as tmp:
            tmp.write_text(json.dumps(header, indent=1) + "\n")
    elif not (root / "header.json").exists():
        raise data.BadInput(f"--out {root} is not empty and no flow store ({inside[0]} is in it, header.json is not); "
                            f"choose a new or empty folder")
    store = data.FlowStore(root)
    differing = [f"{key} is {store.header.get(key)} there and {header.get(key)} now"
                 for key in {**header, **store.header} if store.header.get(key) != header.get(key)]
    if differing:
        raise data.BadInput(f"{root} was made with other settings ({', '.join(differing)}); use those or another --out")
    for tmp in root.rglob(".tmp-*"):  # of killed runs; a day old, because other shards may be writing theirs
        with suppress(OSError):
            if time.time() - tmp.stat().st_mtime > 86400:
                tmp.unlink()
    return store


def finished(store, name, path):
    """The header of a video's flow if that is in the store, whole, and made from the file as it is now; else None."""
    try:
        about = store.open(name).header
        return about if about.get("source_bytes") == os.path.getsize(path) else None
    except (data.BadInput, OSError):
        return None


def run(args):
    """Extract what the store lacks -> exit status."""
    match = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    i, n = map(int, match.groups()) if match else (0, 0)
    if not 1 <= i <= n:
        raise data.BadInput(f"--shard takes i/n with 1 <= i <= n, such as 2/8, not {args.shard}")
    for option, least, most in [("workers", 1, 4096), ("time_limit", 1, 86400), ("short_side", 0, 4096),
                                ("quality", 1, 100), ("warps", 1, 100), ("epsilon", 0, 1)]:
        if not least <= getattr(args, option) <= most:
            raise data.BadInput(f"--{option.replace('_', '-')} takes {least} to {most}, not {getattr(args, option)}")
    backend = args.backend
    if backend == "auto" and (Path(args.out) / "header.json").exists():  # a store goes on as it began
        backend = data.FlowStore(args.out).header.get("backend", "auto")
    settings = make_settings(args.short_side, args.quality, backend, WarpingsNumber=args.warps,
                             Epsilon=args.epsilon)
    found = data.find_videos(args.videos)
    if Path(args.out).resolve().is_relative_to(Path(args.videos).resolve()):
        raise data.BadInput(f"--out {args.out} is inside --videos {args.videos}, where its files would be taken for "
                            f"videos; choose a folder outside")
    store = open_store(args.out, settings)
    jobs, cut, share = {}, {}, list(found)[i - 1::n]
    for name in share:
        about = finished(store, name, found[name])
        if about is None:
            jobs[name] = found[name], str(store.path(name))
        elif sentence := cut_short(found[name], about):
            cut[name] = sentence
    print(f"{len(found)} videos below {args.videos}, {len(share)} of them in shard {i}/{n}, {len(jobs)} to do; "
          f"TV-L1 of {settings['backend']}, short side {args.short_side or 'as it is'}", flush=True)

    progress = Progress(len(jobs))
    skipped, cut_now = extract_all(jobs, settings, args.workers, progress, args.time_limit)
    cut |= cut_now
    if progress.terminal:
        print()
    print(f"{len(jobs) - len(skipped)} videos written, {progress.pairs} pairs, {progress.rate():.1f} pairs/s in "
          f"{args.workers} processes; {len(skipped)} skipped, {len(cut)} cut short")
    for label, sentences in [("skipped", skipped), ("used, but", cut)]:
        for sentence in sentences.values():
            print(f"{label}: {sentence}".encode(errors="backslashreplace").decode())  # a file name need not be Unicode

    listing = store.root / ("skipped.json" if n == 1 else f"skipped-{i}-of-{n}.json")
    for old in store.root.glob("skipped*.json" if n == 1 else listing.name):
        old.unlink(missing_ok=True)
    if skipped or cut:
        with data.atomic(listing) as tmp:
            tmp.write_text(json.dumps({"skipped": skipped, "cut short": cut}, indent=1) + "\n")
    if len(skipped) == len(found):
        raise data.BadInput(f"none of the {len(found)} videos below {args.videos} gave flow; {listing} says why")
    return int(args.strict and bool(skipped or cut))


# ---------------------------------------------------------------------------------------------------------------------
# python flow.py info
# ---------------------------------------------------------------------------------------------------------------------
def colours(flow, top):
    """Flow [H, W, 2] in px -> uint8 [H, W, 3] BGR: hue is direction, white stands still, full colour is `top` px."""
    size, angle = cv2.cartToPolar(flow[..., 0], flow[..., 1], angleInDegrees=True)
    hsv = np.stack([angle / 2, 255 * np.minimum(size / top, 1), np.full_like(size, 255)], axis=-1)
    return cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2BGR)


def picture(store, name, video):
    """The middle flow field of a video, uint8 [H, W, 3] BGR: its frame (if the path `video` is given), flow, wheel."""
    reader = store.open(name)
    t = len(reader) // 2
    flow = np.stack(np.split(data.dequantise(reader.read([t])[0]), 2), axis=-1)  # [h, w, 2]
    h, w = flow.shape[:2]
    top = max(1.0, float(np.quantile(np.linalg.norm(flow, axis=-1), 0.99)))
    wheel = np.stack(np.meshgrid(*2 * [np.linspace(-top, top, h, dtype=np.float32)]), axis=-1)
    wheel[np.linalg.norm(wheel, axis=-1) > top] = 0
    tiles = [colours(flow, top), colours(wheel, top)]
    if video:
        frames = [frame for k, frame in enumerate(data.decode(video)) if k == t]
        tiles = [cv2.resize(frame, (w, h), interpolation=cv2.INTER_AREA) for frame in frames] + tiles
    print(f"{name}: flow {t} of {len(reader)}, {w}x{h} px; full colour is {top:.1f} px or more")
    return np.hstack(tiles).repeat(max(1, 256 // h), axis=0).repeat(max(1, 256 // h), axis=1)


def info(args):
    """Print what a flow store holds; draw a flow field."""
    if bool(args.video) != bool(args.picture) or (args.picture and not cv2.haveImageWriter(args.picture)):
        raise data.BadInput("--video NAME and --picture FILE go together, and FILE ends as a picture does (flow.png)")
    store = data.FlowStore(args.store)
    names = sorted(str(p.relative_to(store.root))[:-4] for p in store.root.rglob("*.avi") if p.name[0] != ".")
    pairs, size, magnitudes, damaged = 0, 0, [], []
    for k, name in enumerate(names):
        try:
            reader = store.open(name)
            pairs, size = pairs + len(reader), size + store.path(name).stat().st_size
            if k % -(-len(names) // 200) == 0:
                magnitudes.append(np.hypot(*np.split(data.dequantise(reader.read([len(reader) // 2])[0]), 2)).mean())
        except data.BadInput as e:
            damaged.append(f"  {e}")
    print(*(f"{key:16} {value}" for key, value in store.header.items()), sep="\n")
    print(f"{len(names)} videos, {pairs} flow fields, {size / 1e6:.1f} MB, {len(damaged)} damaged", *damaged, sep="\n")
    if magnitudes:
        print(f"mean magnitude {np.mean(magnitudes):.3f} px (middle fields of {len(magnitudes)} videos)")
    found = data.find_videos(args.videos) if args.videos else {}
    if found:
        missing = [f"  {name}" for name in found if name not in store]
        print(f"{len(missing)} of the {len(found)} videos below {args.videos} have no flow", *missing, sep="\n")
    if args.picture:
        image = picture(store, args.video, found.get(args.video))
        with data.atomic(args.picture) as tmp:
            cv2.imwrite(str(tmp), image)
    return 0


def main(argv=None):
    """The command -> exit status: 0, or with --strict 1 if videos were skipped or cut short. Raises BadInput."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["info"]:
        p = argparse.ArgumentParser(prog="flow.py info", description=info.__doc__)
        p.add_argument("store", help="folder that flow.py --out made")
        p.add_argument("--videos", help="folder of videos: list those without flow; draw the frame beside its flow")
        p.add_argument("--video", help="name of the video to draw (its path below --videos without suffix)")
        p.add_argument("--picture", help="picture to write, such as flow.png")
        return info(p.parse_args(argv[1:]))
    p = argparse.ArgumentParser(prog="flow.py", description="TV-L1 optical flow of a folder of videos.",
                                epilog="flow.py info STORE says what a store holds (flow.py info --help).")
    p.add_argument("--videos", required=True, help="folder of videos, searched with all below it")
    p.add_argument("--out", required=True, help="the flow store: a new folder, or one to continue")
    p.add_argument("--workers", type=int, default=cores(), help="processes, of one thread each (default: one a core)")
    p.add_argument("--time-limit", type=float, default=600, help="seconds for one pair, then the video is skipped")
    p.add_argument("--shard", default="1/1", metavar="i/n", help="do the i-th of n parts, for n machines on one store")
    p.add_argument("--short-side", type=int, default=256, help="short side in px; 0: as it is (default 256)")
    p.add_argument("--quality", type=int, default=95, help="JPEG quality (default 95)")
    p.add_argument("--warps", type=int, default=TVL1["WarpingsNumber"], help="warps a scale (default 5)")
    p.add_argument("--epsilon", type=float, default=TVL1["Epsilon"], help="when iterations stop (default 0.01)")
    p.add_argument("--backend", choices=["auto", "goca", "opencv"], default="auto",
                   help="who computes: this project's operator, OpenCV, or the first where it agrees with the second")
    p.add_argument("--strict", action="store_true", help="exit status 1 if a video was skipped or cut short")
    return run(p.parse_args(argv))


if __name__ == "__main__":
    data.command_line(main)
