"""Decoding, the index of what decodes, and the processes that survive what a file does to its reader."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.damage import mutate
from helpers.paths import ROOT

import data
from support import video_index
from support.avi import write_avi
from support.datasets import Video, read_split
from support.errors import BadInput
from support.stores import FlowStore
from support.video_index import scan
from support.videos import decode, find_videos, frames_at, with_time_limit
from support.worker_pool import run_in_processes


def film(path, frames=6, size=(48, 32), seed=0):
    """Write a film of noise blocks."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.CAP_OPENCV_MJPEG, cv2.VideoWriter_fourcc(*"MJPG"), 25, size)
    for _ in range(frames):
        writer.write(cv2.resize(rng.integers(0, 256, (4, 6, 3), np.uint8), size, interpolation=cv2.INTER_NEAREST))
    writer.release()
    return path


@pytest.fixture
def folder(tmp_path):
    for i in range(5):
        film(tmp_path / "set" / "a" / f"{i}.avi", frames=3 + i, seed=i)
    return tmp_path / "set"


# --- frames ----------------------------------------------------------------------------------------------------------
def test_frames_at_are_those_of_the_plain_decode(real_clips):
    for path in sorted((real_clips / "ucf101" / "videos").rglob("*.avi"))[:2] + sorted(
            (real_clips / "kinetics400" / "videos").rglob("*.mp4"))[:1]:
        plain = list(decode(path))
        wanted = [0, 3, 4, 17, len(plain) // 2, len(plain) - 1]
        picked = dict(frames_at(path, wanted))
        assert list(picked) == wanted and all(np.array_equal(picked[t], plain[t]) for t in wanted)


def test_frames_past_the_end_are_left_out(folder):
    assert [t for t, _ in frames_at(folder / "a" / "0.avi", [1, 2, 9])] == [1, 2]


def test_a_stall_is_given_up_and_errors_pass_through():
    assert with_time_limit(5, "x", lambda x: x + 1, 2) == 3
    with pytest.raises(BadInput, match=r"x gave nothing for 0\.05 s"):
        with_time_limit(0.05, "x", time.sleep, 2)
    with pytest.raises(ZeroDivisionError):
        with_time_limit(5, "x", lambda: 1 / 0)


def test_a_reader_s_thread_is_gone_when_its_value_is_there(tmp_path):
    """While it ends, OpenCV holds a lock, for which a process forked by then would wait for ever."""
    path = str(film(tmp_path / "a.avi"))

    def read():
        assert cv2.VideoCapture(path).read()[0]
        return threading.get_native_id()

    for _ in range(200):
        assert not os.path.exists(f"/proc/self/task/{with_time_limit(5, path, read)}")


def test_a_video_that_stalls_in_training_is_replaced(folder, tmp_path, monkeypatch):
    store = tmp_path / "flow"
    store.mkdir()
    (store / "header.json").write_text('{"kind": "flow", "version": 1}')
    found = find_videos(folder)
    for name, path in found.items():
        planes = np.full((sum(1 for _ in decode(path)) - 1, 64, 48), 128, np.uint8)
        write_avi(store / f"{name}.avi", planes, {})
    real = frames_at
    monkeypatch.setattr("support.frames.frames_at",
                        lambda path, t, *more: time.sleep(9) if "2.avi" in str(path) else real(path, t))
    listed = [Video(path, name, 0) for name, path in found.items()]
    clips = data.TrainClips(listed, FlowStore(store), frames=2, short_frames=2, size=16, time_limit=0.3)
    item = clips[(0, 2)]
    assert f"{found['a/2']} gave nothing for 0.3 s" in item["fault"] and item["index"] != 2
    assert item["long"]["rgb"].any()


def test_linked_folders_are_followed_once(folder, tmp_path):
    film(tmp_path / "elsewhere" / "x.avi")
    (folder / "b").symlink_to(tmp_path / "elsewhere")
    (folder / "a" / "loop").symlink_to(folder)
    assert set(find_videos(folder)) == {"b/x", *(f"a/{i}" for i in range(5))}


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_rights_says_so(folder):
    (folder / "a" / "1.avi").chmod(0)
    with pytest.raises(BadInput, match="its rights forbid it"):
        next(decode(folder / "a" / "1.avi"))


# --- the index -------------------------------------------------------------------------------------------------------
def test_index_counts_what_decodes(folder, tmp_path):
    (folder / "a" / "bad.avi").write_text("no film")
    film(folder / "one.avi", frames=1)
    whole = film(tmp_path / "whole.avi", frames=40).read_bytes()
    (folder / "cut.avi").write_bytes(whole[:len(whole) // 2])
    index, known = scan(folder, tmp_path / "index.npz", workers=2)
    frames = {name: row[2] for name, row in index.entries.items()}
    assert {name: frames[name] for name in frames if name != "cut"} == {
        "a/0": 3, "a/1": 4, "a/2": 5, "a/3": 6, "a/4": 7, "a/bad": 0, "one": 1}
    assert 10 < frames["cut"] < 30 and f"cut short: {frames['cut']} of" in index.entries["cut"][4]
    assert index.unusable() == {"a/bad", "one"} and known == {"new": 8, "changed": 0, "removed": 0, "kept": 0}
    assert video_index.Index.load(tmp_path / "index.npz").entries == index.entries


def test_index_notices_changed_added_and_removed(folder, tmp_path, monkeypatch):
    scan(folder, tmp_path / "index.npz", workers=1)
    film(folder / "a" / "0.avi", frames=9)
    film(folder / "b.avi", frames=2)
    (folder / "a" / "4.avi").unlink()
    index, known = scan(folder, tmp_path / "index.npz", workers=1)
    assert known == {"new": 1, "changed": 1, "removed": 1, "kept": 3}
    assert index.entries["a/0"][2] == 9 and index.entries["b"][2] == 2 and "a/4" not in index.entries
    monkeypatch.setattr(video_index, "run_in_processes",
                        lambda function, jobs, *rest: iter([("no", "done", 1)] * len(jobs)))
    assert scan(folder, tmp_path / "index.npz")[1]["kept"] == 5  # nothing is decoded twice


def test_read_split_leaves_out_what_the_index_condemns(folder, tmp_path):
    (folder / "a" / "1.avi").write_bytes(b"")
    scan(folder, tmp_path / "index.npz", workers=1)
    found = read_split("folder", folder, index=tmp_path / "index.npz")
    assert found.faulty == ["a/1"] and [v.name for v in found.videos] == ["a/0", "a/2", "a/3", "a/4"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to read a process's memory from")
def test_index_of_a_quarter_of_a_million_loads_fast_and_small(tmp_path):
    n = 240_000
    index = video_index.Index({f"class_{i % 400:03d}/{i:011d}_000000_000010": (i, i, 300, 300, "") for i in range(n)})
    index.save(tmp_path / "index.npz")
    # the system's own account of the peak; getrusage's begins with that of the process that started this one
    code = ("import sys, time; from support.video_index import Index; start = time.process_time();"
            "index = Index.load(sys.argv[1]);"
            "print(len(index.entries), time.process_time() - start,"
            "open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "index.npz")], cwd=ROOT, capture_output=True,
                          text=True, check=True)
    entries, seconds, kilobytes = done.stdout.split()
    print(f"240,000 entries: {seconds} s, {kilobytes} kB with all that Python and torch take")
    assert int(entries) == n and int(kilobytes) < 500_000


def test_scan_by_command(folder, tmp_path, capsys):
    (folder / "a" / "bad.avi").write_text("no film")
    assert video_index.main(["--videos", str(folder), "--index", str(tmp_path / "i.npz"), "--strict"]) == 1
    said = capsys.readouterr().out
    assert "6 videos" in said and "25 frames decode; 1 videos can't be used" in said
    assert "bad.avi holds no frame" in said
    (tmp_path / "i.npz").write_bytes(b"junk")
    with pytest.raises(BadInput, match=r"i\.npz is damaged"):
        video_index.main(["--videos", str(folder), "--index", str(tmp_path / "i.npz")])


# --- processes -------------------------------------------------------------------------------------------------------
def misbehave(job, settings, report):
    """Work of `run_in_processes` for the tests: what to do is the job's second entry."""
    path, what = job
    if what == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if what == "stall":
        time.sleep(60)
    if what == "raise":
        raise ValueError("odd\nfile")
    if what == "full":
        raise BadInput(f"{path} can't be written") from OSError("full")
    report("half")
    return settings + what


def test_each_file_costs_itself_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jobs = {name: (name + ".avi", name) for name in ("one", "crash", "two", "stall", "raise", "three")}
    for file, _ in jobs.values():
        Path(file).touch()
    events = list(run_in_processes(misbehave, jobs, "did ", 2, 1.5))
    assert {name: value for name, kind, value in events if kind == "done"} == {
        "one": "did one", "two": "did two", "three": "did three"}
    failed = {name: value for name, kind, value in events if kind == "failed"}
    assert "crash.avi ended the process that read it (exit code -11)" in failed["crash"]
    assert "stall.avi gave nothing for 1.5 s" in failed["stall"]
    assert failed["raise"] == "raise.avi failed: ValueError odd file"
    assert len([e for e in events if e[1] == "progress"]) == 3 and len(failed) == 3


def test_output_that_fails_ends_the_work():
    with pytest.raises(BadInput, match=r"full\.avi can't be written"):
        list(run_in_processes(misbehave, {"full": ("full.avi", "full"), "one": ("o", "one")}, "", 1, 5))


def test_processes_that_cannot_start_are_one_error_message(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nfrom support.cli import command_line\n"
                      "from support.video_index import scan\n"
                      f"command_line(lambda: scan({str(tmp_path)!r}, {str(tmp_path / 'i.npz')!r}))\n")
    film(tmp_path / "x.avi")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert done.returncode == 2 and '`if __name__ == "__main__":`' in done.stderr


# --- mutated films ---------------------------------------------------------------------------------------------------


def test_three_hundred_mutated_films_are_all_accounted_for(real_clips, tmp_path):
    """Scan and loader: no crash, no hang, good + skipped = all."""
    rng = np.random.default_rng(0)
    sources = [(real_clips / p).read_bytes() for p in sorted(
        str(p.relative_to(real_clips)) for p in (real_clips / "weizmann").rglob("*.avi"))[:4]]
    sources += [next((real_clips / "ucf101" / "videos").rglob("*.avi")).read_bytes()]
    folder = tmp_path / "films"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i}.avi").write_bytes(mutate(sources[i % len(sources)] if i % 25 else sources[-1], rng))
    index, known = scan(folder, tmp_path / "index.npz", time_limit=30)
    assert known["new"] == 300 == len(index.entries)
    good = [name for name in index.entries if name not in index.unusable()]
    assert 50 < len(good) < 300 and all(index.entries[name][4] for name in index.unusable())
    for name in good:  # what the scan counted is what the loader finds
        n = index.entries[name][2]
        frames = dict(frames_at(folder / f"{name}.avi", [0, n - 1, n]))
        assert list(frames) == [0, n - 1], name
