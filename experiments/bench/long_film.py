"""What an hour of film costs: to cut it into segments, and to train on them. A table, not a ratio to a baseline.

    python -m experiments.bench.long_film                         # 1 and 60 minutes; takes two cores 20 minutes
    python -m experiments.bench.long_film --minutes 1 10 --keep DIR

Generated H.264, 320 x 180 at 25 frames a second, through `flow.py --segment 10 --rgb` with DIS flow (TV-L1's own time
is the bench's row flow). For each length: seconds and processor time of flow.py, the peak memory of any of its
processes (from /proc: Linux), the size of the stores; samples a second and core from the segments, with both views, and
from the film as one sample, RGB alone (2 clips of 32 and 4 of 16 frames). Memory and samples should not depend on the
length.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np

import data
from experiments.bench.loader import long_film
from support.cli import Help, command_line, say
from support.datasets import Video
from support.errors import BadInput
from support.segments import expand
from support.stores import FlowStore, RgbStore
from support.worker_pool import cores

FLOW = Path(__file__).parents[2] / "flow.py"


def used(session):
    """{process of this session that lives: (its processor time in s, the most memory it had in bytes)}. The processes
    of flow.py are no children of it whose use the system would hand on."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()  # from the third, the state, on
            peak = re.search(r"VmHWM:\s+(\d+) kB", (folder / "status").read_text())
            if int(fields[3]) == session and peak:
                found[folder.name] = (sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK"), 1024 * int(peak[1]))
    return found


def extraction(videos, folder, segment, workers):
    """Run flow.py -> {"wall": s, "cpu": s, "peak": bytes of its largest process, "stores": bytes}."""
    command = [sys.executable, FLOW, "--videos", videos, "--out", folder / "flow", "--rgb", folder / "rgb",
               "--method", "dis", "--segment", segment, "--workers", workers]
    began, every = time.perf_counter(), {}
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None:
        every |= used(process.pid)
        time.sleep(0.2)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args)
    cpu, peak = zip(*every.values(), strict=True)
    return {"wall": time.perf_counter() - began, "cpu": sum(cpu), "peak": max(peak),
            "stores": sum(f.stat().st_size for kind in ("flow", "rgb") for f in (folder / kind).rglob("*.avi"))}


def samples_a_second(clips, seconds=10.0, least=5):
    """Of one core, over random samples; the first one, which looks the film over, is counted apart -> (rate, its s)."""
    order, times = np.random.default_rng(0), []
    end = time.perf_counter() + seconds
    while len(times) <= least or time.perf_counter() < end:
        began = time.process_time()
        item = clips[(len(times), int(order.integers(len(clips))))]
        times.append(time.process_time() - began)
        assert not item["fault"], item["fault"]
    return (len(times) - 1) / sum(times[1:]), times[0]


def measure(minutes, segment, workers, folder):
    """One length -> a dict of the figures, in seconds and bytes."""
    if (folder / "flow").exists() or (folder / "rgb").exists():
        raise BadInput(f"--keep: {folder} holds stores already; to complete them is no measurement: name another")
    (folder / "films").mkdir(parents=True, exist_ok=True)
    film = folder / "films" / "film.mp4"
    if not film.exists():
        say(f"generating {minutes:g} minutes of film")
        long_film(folder / "part.mp4", round(60 * minutes))
        (folder / "part.mp4").rename(film)
    say(f"flow.py --segment {segment:g} over {minutes:g} minutes of film")
    spent = extraction(folder / "films", folder, segment, workers)
    video, store, rgb = Video(str(film), "film", 0), FlowStore(folder / "flow"), RgbStore(folder / "rgb")
    segments = expand([video], store, rgb)
    spent["segments"] = len(segments)
    spent["rate"], _ = samples_a_second(data.TrainClips(segments, store, rgb=rgb))
    spent["whole"], spent["first"] = samples_a_second(data.TrainClips([video], None, views=("rgb",), time_limit=600))
    return spent


def main():
    p = argparse.ArgumentParser(prog="python -m experiments.bench.long_film", description=__doc__.split("\n")[0],
                                formatter_class=Help)
    p.add_argument("--minutes", type=float, nargs="+", default=[1, 60], help="lengths of film")
    p.add_argument("--segment", type=float, default=10, help="seconds of a segment")
    p.add_argument("--workers", type=int, default=cores(), help="processes of flow.py")
    p.add_argument("--keep", metavar="DIR", help="make films, or take those that are there, and stores in this folder "
                                                 "(default: one that is deleted)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() if args.keep is None else nullcontext(args.keep) as folder:
        for minutes in args.minutes:
            m = measure(minutes, args.segment, args.workers, Path(folder) / f"{minutes:g}_minutes")
            print(f"{minutes:g} minutes, {m['segments']} segments: flow.py {m['wall']:.0f} s with {args.workers} "
                  f"processes, {m['cpu'] / minutes:.1f} s of processor time a minute of film, peak "
                  f"{m['peak'] / 1e6:.0f} MB a process, stores {m['stores'] / 1e6 / minutes:.1f} MB a minute; a core "
                  f"makes {m['rate']:.1f} samples a second of the segments, {m['whole']:.2f} of the whole film (RGB "
                  f"alone; the first in {m['first']:.1f} s)", flush=True)


if __name__ == "__main__":
    command_line(main)
