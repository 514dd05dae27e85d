"""A generated data set: films of articulated figures whose actions differ by motion alone (paper section 1, Fig. 1).

After Johansson's walkers (the paper's reference for "motion alone suffices"): ten actions by one jointed figure. Body,
clothes, viewpoint, place, scale, left or right, resting posture, speed, phase, background and camera are drawn
independently of the action, and single poses are shared between actions: a raised arm may wave, or just be raised.
How a figure moves and is drawn: puppets.py.
The background is textured and shakes with the camera, so appearance pulls RGB astray, as in the paper's Fig. 1.

In   nothing but a seed. Clip i of a subset follows from (seed, subset, i) and does not depend on how many are made.
Out  DIR/videos/<Action>/v_<Action>_g<subject>_c<clip>.avi   motion JPEG, colour, UCF101's layout
     DIR/splits/classInd.txt, trainlist01.txt, testlist01.txt    UCF101's split files
     DIR/walkers.json                                        the settings; an existing set is reused if they agree
A subject (group) has its own body and clothes and performs every action twice. Odd subjects train, even ones test.

    python -m experiments.walkers --out demo/walkers                 400 + 200 clips of 64 px, 18 frames
    python -m experiments.walkers --out demo/walkers --baselines     what trivial baselines score on it
    python -m experiments.walkers --out demo/walkers --sheet sheet.png

About 50 ms a film of 64 px on one core, 250 ms of 256 px; many are made by all cores. The set is no part of the paper.
"""

import argparse
import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from experiments.puppets import ACTIONS, render, subject
from support.cli import command_line
from support.errors import BadInput
from support.files import atomic, check_writable
from support.videos import decode
from support.worker_pool import cores, run_in_processes

VERSION = 2
SETTINGS = {"train": 400, "test": 200, "size": 64, "frames": 18, "seed": 0, "fps": 25}
CLIPS_PER_SUBJECT = 2  # of each action
FILMS_A_PROCESS = 100  # below that, starting one takes as long as the films
TIME_LIMIT = 120  # seconds a film
SUBSETS = ("train", "test")

# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------
def clip_name(subset, index):
    """Clip `index` of a subset -> (action, subject's number, clip's number)."""
    nth = index // len(ACTIONS)  # of its action
    return ACTIONS[index % len(ACTIONS)], 2 * (nth // CLIPS_PER_SUBJECT) + 1 + subset, nth % CLIPS_PER_SUBJECT + 1


def write_film(path, film, fps):
    """Write BGR frames as motion JPEG, by the writer of OpenCV's own: its FFmpeg one cuts odd sizes to even ones."""
    h, w = film[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.CAP_OPENCV_MJPEG, cv2.VideoWriter_fourcc(*"MJPG"), fps, (w, h))
    writer.set(cv2.VIDEOWRITER_PROP_QUALITY, 95)
    for image in film:
        writer.write(image)
    writer.release()
    if not path.is_file() or sum(1 for _ in decode(path)) != len(film):  # the writer says nothing of a full disk
        raise BadInput(f"{path} could not be written whole; is the disk full, or OpenCV without its MJPEG writer?")


def make_film(job, settings, report=None):
    """Write the film of job (path, subset, index) by the settings of `make`; work of `run_in_processes`."""
    path, subset, index = job
    action, group, _ = clip_name(subset, index)
    person = subject(np.random.default_rng([settings["seed"], group, 0]))
    rng = np.random.default_rng([settings["seed"], subset, index, 1])
    write_film(path, render(action, settings["size"], settings["frames"], settings["fps"], person, rng),
               settings["fps"])


def make_films(jobs, settings):
    """Yield once for each film of jobs {name: (path, subset, index)}, as it is written. Raises BadInput where one
    can't be."""
    processes = min(cores(), len(jobs) // FILMS_A_PROCESS)
    if processes < 2:
        yield from (make_film(job, settings) for job in jobs.values())
    else:
        for _, kind, value in run_in_processes(make_film, jobs, settings, processes, TIME_LIMIT):
            if kind != "done":
                raise BadInput(value)
            yield


def settings_of(out):
    """The settings of the set in `out`, or None where there is none. Raises BadInput if other things are there."""
    out = Path(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    try:
        header = json.loads((out / "walkers.json").read_text())
        version = header.pop("version")
    except (OSError, ValueError, KeyError, AttributeError):
        raise BadInput(f"{out} exists and holds no set of walkers (no readable walkers.json in it); "
                       f"choose another --out") from None
    if version != VERSION or header.keys() != SETTINGS.keys():
        raise BadInput(f"{out} holds walkers of version {version}, this program makes version {VERSION}; "
                       f"remove the folder or choose another --out")
    return header


def make(out, train=400, test=200, size=64, frames=18, seed=0, fps=25, progress=False):
    """Make the set in the folder `out`, or keep the one that is there if it was made with the same settings.

    train, test: clips, balanced over the ten actions. size: px, square. frames: a clip. progress: show a bar.
    Returns True if clips were made, False if the set was there.
    Raises BadInput for settings out of range, or if `out` holds other settings, a damaged set, or other things.
    """
    out = Path(out).resolve()
    wanted = {"train": train, "test": test, "size": size, "frames": frames, "seed": seed, "fps": fps}
    for name, least in (("train", 1), ("test", 1), ("size", 16), ("frames", 2), ("seed", 0), ("fps", 1)):
        if wanted[name] < least:
            raise BadInput(f"--{name} is {wanted[name]}, but must be at least {least}")
    existing = settings_of(out)
    if existing is not None:
        differ = [f"--{k} {existing[k]} instead of {v}" for k, v in wanted.items() if existing[k] != v]
        if differ:
            raise BadInput(f"{out} holds walkers made with {', '.join(differ)}; remove it or choose another --out")
        lost = [path for subset in SUBSETS for path, _ in clips(out, subset) if not path.is_file()]
        if lost:
            raise BadInput(f"{out} lacks {len(lost)} of its films, the first {lost[0]}; remove it and run this again")
        return False

    part = out.with_name(out.name + ".part")  # renamed when complete; left over only by a killed process
    shutil.rmtree(part, ignore_errors=True)
    try:
        for action in ACTIONS:
            (part / "videos" / action).mkdir(parents=True)
        (part / "splits").mkdir()
        lists = {"classInd.txt": [f"{i} {action}" for i, action in enumerate(ACTIONS, 1)]}
        jobs = {}
        for subset, count in enumerate((train, test)):
            lines = []
            for index in range(count):
                action, group, clip = clip_name(subset, index)
                name = f"{action}/v_{action}_g{group:02d}_c{clip:02d}.avi"
                jobs[name] = part / "videos" / name, subset, index
                lines.append(name if subset else f"{name} {ACTIONS.index(action) + 1}")
            lists[f"{SUBSETS[subset]}list01.txt"] = sorted(lines)
        with tqdm(total=train + test, unit="film", disable=not progress) as bar:
            for _ in make_films(jobs, wanted):
                bar.update()
        for name, lines in lists.items():
            (part / "splits" / name).write_text("\n".join(lines) + "\n")
        (part / "walkers.json").write_text(json.dumps({"version": VERSION, **wanted}) + "\n")
        if out.exists():
            out.rmdir()  # settings_of found it empty
        os.rename(part, out)
    except OSError as e:
        raise BadInput(f"{out} could not be written ({e.strerror})") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def clips(out, subset):
    """The films of a subset ("train" or "test") in the order of its list -> [(path, label from 0)]."""
    listed = Path(out) / "splits" / f"{subset}list01.txt"
    try:
        names = [line.split()[0] for line in listed.read_text().splitlines()]
    except OSError as e:
        raise BadInput(f"{listed} can't be read ({e.strerror}); remove {out} and make the set again") from e
    return [(Path(out) / "videos" / name, ACTIONS.index(name.split("/")[0])) for name in names]


# ---------------------------------------------------------------------------------------------------------------------
# Trivial baselines
# ---------------------------------------------------------------------------------------------------------------------
def flow_histogram(grey):
    """Farneback flow of grey frames [T, H, W] uint8, less each pair's median -> [128]: speed by place and direction."""
    total = 0
    for a, b in pairwise(grey):
        flow = cv2.calcOpticalFlowFarneback(a, b, None, 0.5, 3, 9, 3, 5, 1.1, 0)
        flow -= np.median(flow, axis=(0, 1))
        speed, angle = cv2.cartToPolar(flow[..., 0], flow[..., 1])
        bins = np.minimum((angle * (8 / (2 * np.pi))).astype(int), 7)
        maps = np.stack([np.where(bins == k, speed, 0) for k in range(8)], axis=-1)
        total = total + cv2.resize(maps, (4, 4), interpolation=cv2.INTER_AREA).ravel()
    return np.sqrt(total)


def descriptors(path):
    """One film -> {name of a baseline: its vector}."""
    film = np.stack(list(decode(path)))  # [T, H, W, 3]
    grey = np.stack([cv2.cvtColor(f, cv2.COLOR_BGR2GRAY) for f in film])
    change = np.abs(np.diff(grey.astype(np.float32), axis=0)).mean(0)
    colours = np.histogramdd(film.reshape(-1, 3), bins=(6, 6, 6), range=((0, 256),) * 3)[0]
    return {"mean grey frame": grey.mean(0).ravel(), "mean colour frame": film.mean(0).ravel(),
            "colour histogram": np.sqrt(colours.ravel()), "middle frame": film[len(film) // 2].astype(float).ravel(),
            "mean frame difference": cv2.resize(change, (16, 16), interpolation=cv2.INTER_AREA).ravel(),
            "flow histogram": flow_histogram(grey)}


def baselines(out):
    """R@1 of the nearest training film (cosine of centred vectors) of every test film.

    Returns {"train", "test", "chance", "chance_stderr", "results": {name: {"R@1", "stderr"}}}, in per cent.
    """
    vectors, labels = {}, {}
    for subset in SUBSETS:
        films = clips(out, subset)
        labels[subset] = np.array([label for _, label in films])
        found = [descriptors(path) for path, _ in films]
        vectors[subset] = {k: np.stack([d[k] for d in found]) for k in found[0]}
    n = len(labels["test"])

    def stderr(p):
        return 100 * float(np.sqrt(p * (1 - p) / n))

    results = {}
    for name, x in vectors["train"].items():
        mean = x.mean(0)
        x, y = x - mean, vectors["test"][name] - mean
        x, y = (v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-9) for v in (x, y))
        right = float((labels["train"][(y @ x.T).argmax(1)] == labels["test"]).mean())
        results[name] = {"R@1": 100 * right, "stderr": stderr(right)}
    chance = 1 / len(ACTIONS)
    return {"train": len(labels["train"]), "test": n, "chance": 100 * chance, "chance_stderr": stderr(chance),
            "results": results}


def sheet(out, columns=9, subset="train"):
    """A picture of the encoded films, a row for each action -> uint8 [H, W, 3], BGR."""
    rows = []
    for label, action in enumerate(ACTIONS):
        films = [path for path, k in clips(out, subset) if k == label]
        if not films:
            continue
        film = list(decode(films[label % len(films)]))
        picked = [film[i] for i in np.linspace(0, len(film) - 1, columns).round().astype(int)]
        zoom = max(1, round(96 / len(film[0])))
        cells = [np.pad(cv2.resize(f, None, fx=zoom, fy=zoom, interpolation=cv2.INTER_CUBIC),
                        ((1, 1), (1, 1), (0, 0)), constant_values=255) for f in picked]
        title = np.full((len(cells[0]), 110, 3), 255, np.uint8)
        cv2.putText(title, action, (4, len(title) // 2 + 5), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
        rows.append(np.hstack([title, *cells]))
    return np.vstack(rows)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m experiments.walkers", description=__doc__.split("\n")[0],
        epilog="An existing set is kept; settings not given are then its own.")
    parser.add_argument("--out", required=True, metavar="DIR", help="the set's folder")
    words = {"train": "training clips", "test": "test clips", "size": "px, square", "frames": "frames a clip",
             "fps": "frames a second", "seed": "another seed, another set"}
    for name, default in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{words[name]} (default {default})")
    parser.add_argument("--baselines", action="store_true", help="print what trivial baselines score on the set")
    parser.add_argument("--json", metavar="FILE", help="write the baselines here too")
    parser.add_argument("--sheet", metavar="FILE", help="write a picture of the films, .png or .jpg")
    args = parser.parse_args(argv)

    if args.json and not args.baselines:
        raise BadInput("--json holds the baselines: give --baselines too")
    for option, path in (("--json", args.json), ("--sheet", args.sheet)):
        if path:
            check_writable(path, option)
    start = settings_of(args.out) or SETTINGS
    wanted = {k: start[k] if getattr(args, k) is None else getattr(args, k) for k in SETTINGS}

    made = make(args.out, **wanted, progress=True)
    print(f"{args.out}: {'made' if made else 'kept'} {wanted['train']} + {wanted['test']} films of {len(ACTIONS)} "
          f"actions, {wanted['frames']} frames of {wanted['size']} px, seed {wanted['seed']}")
    if args.sheet:
        with atomic(args.sheet) as tmp:
            if not cv2.imwrite(str(tmp), sheet(args.out)):
                raise BadInput(f"{args.sheet} could not be written as a picture; let it end in .png or .jpg")
        print(args.sheet)
    if args.baselines:
        found = baselines(args.out)
        print(f"R@1 of the nearest of {found['train']} training films, {found['test']} queries; "
              f"chance {found['chance']:.1f} +- {found['chance_stderr']:.1f}")
        for name, row in found["results"].items():
            print(f"  {name:24s}{row['R@1']:5.1f} +- {row['stderr']:.1f}")
        if args.json:
            with atomic(args.json) as tmp:
                tmp.write_text(json.dumps({"settings": wanted, **found}, indent=1) + "\n")
            print(args.json)
    return 0


if __name__ == "__main__":
    command_line(main)
