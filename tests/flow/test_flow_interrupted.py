"""Stage 1 among machines that misbehave: processes that stop, disks and GPUs that go missing, names that mislead."""

import errno
import inspect
import json
import multiprocessing
import os
import shutil
import signal
import struct
import threading
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from helpers.flow import command, extract, film, make_set, moving, tree

import flow
from support import flow_methods, flow_pipeline, video_index, worker_pool
from support.errors import BadInput
from support.stores import FlowStore, open_store
from support.video_index import scan
from support.videos import decode, find_videos, frames_at

TRIAL = ["--warps", "1", "--epsilon", "0.1"]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A folder of three videos."""
    return make_set(tmp_path_factory.mktemp("three") / "videos", 3)


# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------
def misbehave(job, settings, report):
    """Work of `in_processes`: what to do is the job's second entry."""
    path, what = job
    if what == "stop":  # in the middle of a message
        report(os.getpid())
        pipe = inspect.getclosurevars(report).nonlocals["pipe"]
        os.write(pipe.fileno(), struct.pack("!i", 3_000_000) + bytes(1000))
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "read":
        next(decode(path))
    return what


def files(folder, *whats):
    """Jobs of empty files."""
    for k in range(len(whats)):
        (folder / f"{k}.avi").touch()
    return {k: (str(folder / f"{k}.avi"), what) for k, what in enumerate(whats)}


@pytest.mark.parametrize("dies", [True, False], ids=["is killed", "waits for a dead disk"])
def test_a_message_that_stops_half_way_costs_its_video(tmp_path, monkeypatch, dies):
    """Also where not even SIGKILL ends the process."""
    kill = BaseProcess.kill
    if not dies:
        monkeypatch.setattr(BaseProcess, "kill", lambda self: None)
        monkeypatch.setattr(worker_pool, "EXIT_TIMEOUT", 0.3)
    began, events = time.monotonic(), []
    for event in worker_pool.run_in_processes(misbehave, files(tmp_path, "stop", "a", "b", "c"), None, 2, 1.5):
        events.append(event)
    reported = [value for _, kind, value in events if kind == "progress"]
    try:
        assert {name for name, kind, _ in events if kind == "done"} == {1, 2, 3}
        (message,) = [value for _, kind, value in events if kind == "failed"]
        assert "0.avi gave nothing for 1.5 s" in message
        assert time.monotonic() - began < 20 and not multiprocessing.active_children()
        assert Path(f"/proc/{reported[0][0]}").exists() != dies
    finally:
        monkeypatch.setattr(BaseProcess, "kill", kill)
        with suppress(ProcessLookupError):
            os.kill(reported[0][0], signal.SIGKILL)


def chatter(job, settings, report):
    """Work of `in_processes`: messages too large for a pipe, with the time when each is sent."""
    for _ in range(10):
        report(time.monotonic(), bytes(1_000_000))


def test_no_message_is_received_before_the_last_was_taken(tmp_path):
    """Waiting for a GPU makes the decoders wait, and costs no video by --time-limit."""
    events = worker_pool.run_in_processes(chatter, files(tmp_path, None), None, 1, 0.5)
    first = next(events)[2][0]
    time.sleep(1)  # twice the limit
    assert sum(value[0] - first < 0.9 for _, kind, value in events if kind == "progress") <= 2


def test_processes_killed_one_after_the_other_end_the_run(tmp_path, monkeypatch):
    """A memory limit is no fault of the videos; one that works in between is a sign that it suffices."""
    assert worker_pool.MAX_CONSECUTIVE_FAILURES == 20
    monkeypatch.setattr(worker_pool, "MAX_CONSECUTIVE_FAILURES", 4)
    with pytest.raises(BadInput, match=r"4 videos in a row gave nothing.*\(exit code -9\).*fewer --workers"):
        list(worker_pool.run_in_processes(misbehave, files(tmp_path, *["kill"] * 6), None, 2, 60))
    whats = ["kill"] * 2 + ["fine"] + ["kill"] * 3
    assert len(list(worker_pool.run_in_processes(misbehave, files(tmp_path, *whats), None, 1, 60))) == 6


def test_a_long_tmpdir_is_a_message(three, run_script, tmp_path):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    said = run_script("flow.py", "--videos", three, "--out", tmp_path / "s", status=2, TMPDIR=str(long))
    error = said[said.index("error: "):]
    assert error.count("\n") == 1 and f"no socket for them in {long}" in error and "set TMPDIR to" in error


# ---------------------------------------------------------------------------------------------------------------------
# Disks
# ---------------------------------------------------------------------------------------------------------------------
def test_videos_that_vanish_one_after_the_other_end_the_run(tmp_path):
    """Not so those whose content is bad: they are not unavailable."""
    jobs = files(tmp_path, *["read"] * 50)
    assert {kind for _, kind, _ in worker_pool.run_in_processes(misbehave, jobs, None, 2, 60)} == {"failed"}
    for path, _ in jobs.values():
        os.remove(path)
    with pytest.raises(BadInput, match=r"20 videos in a row gave nothing.*avi doesn't exist.*same command"):
        list(worker_pool.run_in_processes(misbehave, jobs, None, 2, 60))


@pytest.mark.parametrize("more", [[], ["--batch", "8"]], ids=["processes", "batches"])
def test_a_folder_that_goes_away_ends_the_run(tmp_path, monkeypatch, more):
    make_set(tmp_path / "v", 6)
    found = find_videos(tmp_path / "v")

    def unplug(root):
        os.rename(root, tmp_path / "unplugged")
        return found

    monkeypatch.setattr(flow, "find_videos", unplug)
    with pytest.raises(BadInput, match=r"--videos .*v is no longer a folder; .*the same command continues"):
        command(tmp_path / "v", tmp_path / "s", *TRIAL, *more)
    os.rename(tmp_path / "unplugged", tmp_path / "v")
    monkeypatch.undo()
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL, *more) == 0
    assert all(name in FlowStore(tmp_path / "s") for name in found)


def test_links_that_lead_nowhere_are_no_sign_of_it(three, tmp_path):
    """Of a data set of which not all was fetched: as many as there may be."""
    shutil.copytree(three, tmp_path / "v")
    for k in range(worker_pool.MAX_CONSECUTIVE_FAILURES + 2):
        (tmp_path / "v" / f"{k}.avi").symlink_to("nowhere")
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL) == 0
    skipped = json.loads((tmp_path / "s" / "skipped.json").read_text())["skipped"]
    assert len(skipped) == worker_pool.MAX_CONSECUTIVE_FAILURES + 2


def test_a_scan_condemns_nothing_that_is_unavailable(tmp_path, monkeypatch):
    """It is looked at again by the next, though it has not changed."""
    make_set(tmp_path / "v", 2)
    (tmp_path / "v" / "link.avi").symlink_to("nowhere")
    file = tmp_path / "v" / "a" / "v1.avi"

    def unplug(*args):
        file.rename(tmp_path / "unplugged")
        yield from worker_pool.run_in_processes(*args)

    monkeypatch.setattr(video_index, "run_in_processes", unplug)
    index, _ = scan(tmp_path / "v", tmp_path / "i.npz", workers=1)
    assert [index.entries[name][2] for name in ("a/v0", "a/v1", "link")] == [4, 0, 0]
    assert all(index.entries[name][4].endswith("doesn't exist") for name in ("a/v1", "link"))
    (tmp_path / "unplugged").rename(file)
    monkeypatch.undo()
    index, known = scan(tmp_path / "v", tmp_path / "i.npz", workers=1)
    assert index.entries["a/v1"][2] == 4 and known == {"new": 0, "changed": 1, "removed": 0, "kept": 2}


def test_a_disk_that_fails_within_a_file_makes_no_short_flow(three, tmp_path, monkeypatch):
    """The decoder can't report it from a file that is cut short."""
    path, frames = three / "a" / "v0.avi", list(decode(three / "a" / "v0.avi"))
    monkeypatch.setattr(flow_pipeline, "decode", lambda path, fps: iter(frames[:2]))
    about = extract(path, tmp_path / "cut.avi", short_side=0)
    assert about["source_frames"] == 2 and flow_pipeline.cut_short_message(path, about)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(flow_pipeline, "open", fail, raising=False)
    with pytest.raises(BadInput, match=r"v0\.avi can't be read to its end \(Input/output error\)") as caught:
        extract(path, tmp_path / "bad.avi", short_side=0)
    assert caught.value.__cause__ is None and not (tmp_path / "bad.avi").exists()  # no fault of the output


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_store_is_begun_without_hard_links(tmp_path, monkeypatch, code):
    """As with them: of shards that start together one writes the header, and the others are held to it."""
    def link(*_):
        raise OSError(code, os.strerror(code))

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "chmod", refuse)  # some of these have no rights either
    for attempt in range(5):
        results, start = [], threading.Barrier(6)

        def shard(k, root=tmp_path / str(attempt), results=results, start=start):
            start.wait()
            with suppress(BadInput):
                results.append(open_store(FlowStore, root, {"short_side": k % 2}).header["short_side"])

        threads = [threading.Thread(target=shard, args=(k,)) for k in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(results) == 3 and len(set(results)) == 1
        assert [p.name for p in (tmp_path / str(attempt)).iterdir()] == ["header.json"]


def test_what_is_damaged_within_is_made_again_and_found(three, tmp_path, capsys):
    """A run looks at where each frame begins; `info --check` at every byte."""
    store = tmp_path / "s"
    assert command(three, store, *TRIAL) == 0
    reader = FlowStore(store).open("a/v1")
    whole, middle = reader.path.read_bytes(), int(reader._at[1])

    def damage(*spans):
        content = bytearray(whole)
        for a, b in spans:
            content[a:b] = bytes(b - a)
        reader.path.write_bytes(content)
        capsys.readouterr()

    for span in ((middle - 8, middle - 4), (middle - 4, middle), (middle, middle + 2)):  # name, size, JPEG
        damage(span)
        with pytest.raises(BadInput, match=r"v1\.avi is damaged at frame 1; remove it and run again"):
            FlowStore(store).open("a/v1").check()
        assert command(three, store, *TRIAL) == 0 and reader.path.read_bytes() == whole
        assert "1 to do" in capsys.readouterr().out

    end = middle + int(reader._size[1])
    damage((end - 40, end - 20))  # it still decodes
    assert command(three, store, *TRIAL) == 0 and "0 to do" in capsys.readouterr().out
    assert flow.main(["info", str(store)]) == 0
    assert " 0 damaged (by where frames begin; --check reads each)" in capsys.readouterr().out
    assert flow.main(["info", str(store), "--check"]) == 0
    assert "3 videos, 6 flow fields" in (said := capsys.readouterr().out) and " 1 damaged (each frame read)" in said
    assert "v1.avi is damaged (its checksum is another); remove it" in said


@pytest.mark.parametrize("more", [[], ["--rgb"]], ids=["flow", "and rgb"])
def test_no_video_is_overwritten(tmp_path, more):
    """No store may hold, or lie in, another folder: by name or by a link."""
    make_set(tmp_path / "films" / "v", 2)
    before = tree(tmp_path)
    places = ["films", "films/v", "films/v/a", "films/v/s"]
    if more:
        cases = [("s", place) for place in [*places, "s", "s/r", "."]]
    else:
        cases = [(place,) for place in places]
    for out, *rgb in cases:
        with pytest.raises(BadInput, match=r"--\w+ .* is (inside )?--\w+"):
            command(tmp_path / "films" / "v", tmp_path / out, *more, *(str(tmp_path / place) for place in rgb))
    open_store(FlowStore, tmp_path / "store", flow_methods.make_settings(short_side=0))
    make_set(tmp_path / "store" / "mine", 1)
    (tmp_path / "films" / "v" / "mine").symlink_to(tmp_path / "store" / "mine")
    with pytest.raises(BadInput, match=r"mine/a leads into --out .*store"):
        command(tmp_path / "films" / "v", tmp_path / "store")
    assert tree(tmp_path / "films").items() <= {k.removeprefix("films/"): v for k, v in before.items()}.items()


# ---------------------------------------------------------------------------------------------------------------------
# Names and files that mislead
# ---------------------------------------------------------------------------------------------------------------------
def test_a_name_that_is_no_unicode_is_a_message(three, tmp_path):
    """OpenCV would end the process."""
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.avi")
    Path(path).write_bytes((three / "a" / "v0.avi").read_bytes())
    for read in (lambda: next(decode(path)), lambda: next(frames_at(Path(path), [0]))):
        with pytest.raises(BadInput, match=r"its name is no UTF-8; rename it"):
            read()
    shutil.copy(three / "a" / "v0.avi", tmp_path / "v0.avi")
    assert command(tmp_path, tmp_path.parent / f"{tmp_path.name}-s", *TRIAL, "--strict") == 1


@pytest.mark.parametrize("head", ["ffconcat version 1.0\nfile {0}\n", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n{0}\n",
                                  '<?xml version="1.0"?>\n<MPD profiles="urn:mpeg:dash:profile:isoff-live:2011"/>',
                                  "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\n"])
def test_lists_of_other_files_are_not_followed(three, tmp_path, head):
    shutil.copy(three / "a" / "v0.avi", tmp_path / "other.avi")
    (tmp_path / "list.mp4").write_text(head.format("other.avi"))
    with pytest.raises(BadInput, match=r"list\.mp4 is a list of other files, no video"):
        next(decode(tmp_path / "list.mp4"))


def test_a_video_named_as_a_folder_of_videos(tmp_path, capsys):
    """Its flow would be named as their folder; the folder alone is no fault."""
    make_set(tmp_path / "v" / "sub.avi", 1)
    assert command(tmp_path / "v", tmp_path / "s", *TRIAL) == 0
    capsys.readouterr()
    assert flow.main(["info", str(tmp_path / "s")]) == 0
    assert "1 videos, 3 flow fields" in (said := capsys.readouterr().out) and " 0 damaged" in said
    film(tmp_path / "v" / "sub.mp4", moving(3, 32, 32, 1, 0), "mp4v")
    with pytest.raises(BadInput, match=r"sub\.mp4 and the folder .*sub\.avi would have one name in a store"):
        command(tmp_path / "v", tmp_path / "s", *TRIAL)


# ---------------------------------------------------------------------------------------------------------------------
# Reporting
# ---------------------------------------------------------------------------------------------------------------------
def test_nobody_reads_the_output(forked, tmp_path):
    """`| head -1`: all is done and listed the same; what only prints ends."""
    make_set(tmp_path / "v", 1)
    (tmp_path / "v" / "text.mp4").write_text("no film")
    (tmp_path / "v" / "link.mp4").symlink_to("nowhere")
    videos, store = ["--videos", str(tmp_path / "v")], str(tmp_path / "s")

    def unread(stage, *argv, line="", status=0):
        forked("unread", stage=stage, argv=[*argv, *videos], line=line, status=status, said=tmp_path / "said")
        return (tmp_path / "said").read_text()

    first = f"3 videos below {tmp_path / 'v'}, 3 of them in shard 1/1; looking at the store\n"
    assert unread("flow", "--out", store, "--short-side", "0", "--workers", "1", *TRIAL, line=first) == ""
    listed = json.loads((tmp_path / "s" / "skipped.json").read_text())["skipped"]
    assert listed.keys() == {"text", "link"} and listed["link"].endswith("link.mp4 doesn't exist")
    assert "a/v0" in FlowStore(store)
    said = unread("flow", "info", store) + unread("video_index", "--index", str(tmp_path / "i"), status=141)
    assert "Traceback" not in said and "BrokenPipe" not in said


def test_lists_of_another_division_lose_what_is_in_this_one(tmp_path):
    make_set(tmp_path / "v", 1)
    bad = [tmp_path / "v" / f"bad{k}.mp4" for k in range(6)]
    for path in bad:
        path.write_text("no film")
    store = tmp_path / "s"

    def listed():
        return {path.name: set(json.loads(path.read_text())["skipped"]) for path in store.glob("skipped*.json")}

    for i in (1, 2, 3):
        command(tmp_path / "v", store, *TRIAL, "--shard", f"{i}/3")
    assert len(listed()) == 3 and set.union(*listed().values()) == {f"bad{k}" for k in range(6)}
    (store / "skipped-mine.json").write_text("[]")
    command(tmp_path / "v", store, *TRIAL, "--shard", "1/2")
    (store / "skipped-mine.json").unlink()
    lists = listed()
    assert sum(map(len, lists.values())) == 6 and lists["skipped-1-of-2.json"]  # each once
    bad[5].unlink()
    command(tmp_path / "v", store, *TRIAL, "--shard", "2/2")
    assert listed().keys() == {"skipped-1-of-2.json", "skipped-2-of-2.json"}
    for path in bad[:5]:
        path.unlink()
    command(tmp_path / "v", store, *TRIAL)
    assert not listed()
