"""launch/slurm.sh against stand-ins for Slurm's commands, which do what its manuals say."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers.paths import ROOT

from support import worker_pool
from support.distributed import cores_per_process

SCRIPT = ROOT / "launch" / "slurm.sh"
SCONTROL = """#!/bin/bash
echo "scontrol $@" >> {folder}/said; echo first; echo second
"""
# its tasks run at the same time; with --kill-on-bad-exit one that fails ends the others; the highest status is its own
SRUN = """#!{python}
import os, signal, subprocess, sys, time
n = next(i for i, a in enumerate(sys.argv) if not a.startswith("-") and i)
assert sys.argv[1:n] == ["--kill-on-bad-exit=1", "--cpus-per-task=3"], sys.argv
tasks = [subprocess.Popen(sys.argv[n:], start_new_session=True, env={{**os.environ, "SLURM_PROCID": str(i),
         "SLURM_LOCALID": str(i)}}) for i in (0, 1)]
def to_all(sig, *_):
    for task in tasks:
        if task.poll() is None:
            os.killpg(task.pid, sig)
signal.signal(signal.SIGUSR1, to_all)
killed = False
while any(task.poll() is None for task in tasks):
    if not killed and any(task.poll() for task in tasks):
        killed = True
        time.sleep(0.3)
        to_all(signal.SIGTERM)
        time.sleep(0.3)
        to_all(signal.SIGKILL)
    time.sleep(0.02)
sys.exit(max(task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks))
"""
INTERPRETER = """#!{python}
import os, signal, sys, time
e = os.environ
with open("{folder}/said", "a") as f:
    f.write(f"{{e['RANK']}}/{{e['WORLD_SIZE']}} {{e['LOCAL_RANK']}}/{{e['LOCAL_WORLD_SIZE']}} "
            f"{{e['MASTER_ADDR']}}:{{e['MASTER_PORT']}} {{sys.argv[1:]}}\\n")
status = {statuses}[int(e["RANK"])]
signal.signal(signal.SIGUSR1, lambda *_: os._exit(138))
if status == "waits":  # for the other, in a collective
    time.sleep(20)
sys.exit(status)
"""


def start(folder, statuses, arguments=("@presets/one-gpu", "--out", "a b"), **environment):
    """The script with processes that leave with `statuses` -> Popen."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("interpreter", INTERPRETER)):
        (folder / name).write_text(text.format(folder=folder, python=sys.executable, statuses=statuses))
        (folder / name).chmod(0o755)
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": "interpreter", "SLURM_JOB_ID": "70007",
                    "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
                    "SLURM_CPUS_PER_TASK": "3"}
    return subprocess.Popen(["bash", SCRIPT, *arguments], cwd=folder, env=environment)


@pytest.mark.parametrize(("statuses", "status", "again"), [
    ([0, 0], 0, False), ([2, 2], 2, False), ([2, "waits"], 2, False), (["waits", 2], 2, False), ([75, 2], 2, False),
    ([75, 75], 75, True), ([1, "waits"], 143, True), ([138, 138], 138, True)])
def test_the_script_starts_a_process_a_gpu_and_itself_again(tmp_path, statuses, status, again):
    """Again unless all is done or one had bad input, whatever became of the others."""
    assert start(tmp_path, statuses).wait(30) == status
    said = (tmp_path / "said").read_text().splitlines()
    assert said[0] == "scontrol show hostnames n[1-2]"
    told = ["pretrain.py", "@presets/one-gpu", "--out", "a b"]
    assert sorted(said[1:3]) == [f"0/2 0/2 first:30007 {told}", f"1/2 1/2 first:30007 {told}"]
    assert said[3:] == (["scontrol requeue 70007"] if again else [])
    assert {p.name for p in tmp_path.iterdir()} == {"said", "srun", "scontrol", "interpreter"}


def test_arguments_come_through_as_they_are(tmp_path):
    arguments = ["@presets/one-gpu", "--videos", "x*y", "$HOME", "it's", ""]
    assert start(tmp_path, [0, 0], arguments).wait(30) == 0
    assert (tmp_path / "said").read_text().count(str(["pretrain.py", *arguments])) == 2


@pytest.mark.parametrize(("restarts", "again"), [("49", True), ("50", False), ("51", False)])
def test_a_job_is_put_back_fifty_times(tmp_path, restarts, again):
    assert start(tmp_path, [75, 75], SLURM_RESTART_COUNT=restarts).wait(30) == 75
    assert ("requeue" in (tmp_path / "said").read_text()) == again


def test_what_is_asked_of_slurm():
    """The warning goes to the processes and leaves time to save; a job that is put back adds to its output."""
    asked = re.findall(r"^#SBATCH --(\S+)$", SCRIPT.read_text(), re.MULTILINE)
    assert {"signal=USR1@300", "requeue", "open-mode=append"} <= set(asked)


def test_the_warning_before_the_end_reaches_the_processes_through_their_shells(tmp_path):
    job = start(tmp_path, ["waits", "waits"])
    for _ in range(200):
        if (tmp_path / "said").exists() and (tmp_path / "said").read_text().count("pretrain.py") == 2:
            break
        time.sleep(0.05)
    time.sleep(0.5)  # until both have set their handlers
    srun = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(srun[0]), signal.SIGUSR1)
    assert job.wait(30) == 138
    assert (tmp_path / "said").read_text().splitlines()[-1] == "scontrol requeue 70007"


@pytest.mark.parametrize(("environment", "cores"), [
    ({}, 12), ({"LOCAL_WORLD_SIZE": "8", "TORCHELASTIC_RUN_ID": "x"}, 1), ({"LOCAL_WORLD_SIZE": "4"}, 3),
    ({"LOCAL_WORLD_SIZE": "8", "SLURM_PROCID": "3", "SLURM_CPUS_PER_TASK": "12"}, 12),  # bound to its share
    ({"LOCAL_WORLD_SIZE": "8", "SLURM_PROCID": "3", "SLURM_CPUS_PER_TASK": "5"}, 5),  # not bound
    ({"LOCAL_WORLD_SIZE": "4", "SLURM_PROCID": "0", "SLURM_CPUS_PER_TASK": "12", "TORCHELASTIC_RUN_ID": "x"}, 3)])
def test_a_process_takes_its_share_of_the_cores(monkeypatch, environment, cores):
    for name in ("LOCAL_WORLD_SIZE", "SLURM_PROCID", "SLURM_CPUS_PER_TASK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(worker_pool, "cores", lambda: 12)
    assert cores_per_process() == cores
