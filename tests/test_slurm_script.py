"""presets/slurm.sh: what it hands on, how often it starts again, and what it asks of Slurm."""

import os
import re
import subprocess

import pytest
from conftest import ROOT

SCRIPT = ROOT / "presets" / "slurm.sh"
STUB = """#!/bin/bash
case $(basename $0) in
    scontrol) printf '[%s]' "$@" >> {said}/scontrol; echo first ;;
    srun) while [[ $1 = -* ]]; do printf '[%s]' "$1" >> {said}/srun; shift; done; SLURM_PROCID=0 SLURM_LOCALID=0 "$@" ;;
    interpreter) printf '[%s]' "$@" >> {said}/arguments; exit {status} ;;
esac
"""


def batch(root, status, *arguments, restarts=None):
    """Run the script among stand-ins of Slurm's commands -> what each was called with."""
    for name in ("srun", "scontrol", "interpreter"):
        (root / name).write_text(STUB.format(said=f"{root}/said", status=status))
        (root / name).chmod(0o755)
    environment = {"PATH": f"{root}:{os.environ['PATH']}", "PYTHON": "interpreter", "SLURM_JOB_ID": "7",
                   "SLURM_JOB_NODELIST": "n1", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
                   **({} if restarts is None else {"SLURM_RESTART_COUNT": str(restarts)})}
    (root / "said").mkdir()
    assert subprocess.run(["bash", SCRIPT, *arguments], env=environment).returncode == status
    return {p.name: p.read_text() for p in (root / "said").iterdir()}


def test_arguments_come_through_as_they_are(tmp_path):
    arguments = ["@presets/one-gpu", "--out", "a b", "--videos", "x*y", "$HOME", "it's", ""]
    said = batch(tmp_path, 0, *arguments)
    assert said["arguments"] == "[pretrain.py]" + "".join(f"[{a}]" for a in arguments)


def test_one_process_that_fails_ends_all(tmp_path):
    assert batch(tmp_path, 0)["srun"] == "[--kill-on-bad-exit=1][--cpus-per-task=1]"


@pytest.mark.parametrize(("restarts", "again"), [(None, True), (49, True), (50, False), (51, False)])
def test_a_job_is_put_back_fifty_times(tmp_path, restarts, again):
    assert ("[requeue][7]" in batch(tmp_path, 75, restarts=restarts)["scontrol"]) == again


def test_what_is_asked_of_slurm():
    """The warning goes to the processes and leaves time to save; a job that is put back adds to its output."""
    asked = re.findall(r"^#SBATCH --(\S+)$", SCRIPT.read_text(), re.MULTILINE)
    assert {"signal=USR1@300", "requeue", "open-mode=append"} <= set(asked)
