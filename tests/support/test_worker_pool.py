"""Processes: so many and no more, and none that outlives what started it."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.paths import ROOT

from support.worker_pool import run_in_processes

HERE = Path(__file__).parent


def stays(job, settings, report):
    """Say which process this is, and when it worked."""
    began = time.monotonic()
    time.sleep(0.1)
    return os.getpid(), began, time.monotonic()


@pytest.mark.parametrize("most", [1, 3])
def test_so_many_processes_and_no_more_work_at_once(most):
    jobs = {str(k): (f"{k}.avi",) for k in range(8)}
    done = [value for _, kind, value in run_in_processes(stays, jobs, None, most, 60) if kind == "done"]
    assert len(done) == 8 and len({pid for pid, _, _ in done}) == most
    starts = [began for _, began, _ in done]
    at_once = [sum(a <= t < b for _, a, b in done) for t in starts]
    assert max(at_once) <= most


def talks(job, settings, report):
    """Leave its number behind and speak until nobody listens, or say nothing for a while."""
    (Path(settings) / f"{os.getpid()}").touch()
    while job[0] == "talks":
        report(1)
        time.sleep(0.02)
    time.sleep(1)


def parent(folder):
    """Two processes at work, one idle; run in a process that is killed."""
    for _ in run_in_processes(talks, {k: (k,) for k in ("talks", "silent")}, folder, 3, 60):
        pass


def alive(pid):
    with suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_processes_end_when_what_started_them_is_killed(tmp_path):
    code = (f"import sys; sys.path[:0] = ['{HERE}', '{HERE.parent}', '{ROOT}']; import test_worker_pool as t;"
            f"t.parent('{tmp_path}')")
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while len(pids := [int(p.name) for p in tmp_path.iterdir()]) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    assert all(map(alive, pids))
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.02)
