"""Signals to torchrun itself, which ends with status 1 or none of its own: what becomes of its processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.evaluation import in_two_processes
from helpers.paths import ROOT
from helpers.small_runs import command

import evaluate
from support import cli
from support.checkpoints import load_checkpoint


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("sig", "status", "words"), [(signal.SIGUSR1, -signal.SIGUSR1, "asked to stop (signal 1): "),
                                                      (signal.SIGTERM, 1, "asked to stop (signal 15): ")])
def test_a_signal_to_torchrun_lets_its_processes_save_and_end(tiny, tmp_path, sig, status, words):
    """SIGUSR1 ends torchrun at once: its processes notice that they are orphans."""
    with open(tmp_path / "said", "w") as said:
        torchrun = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                                     "--master-port", str(29700 + os.getpid() % 200), str(ROOT / "pretrain.py"),
                                     *command(tiny, "--batch-size", "4", "--epochs", "5000", "--log-every", "1",
                                              "--accumulate", "2"), "--out", str(tmp_path / "run")],
                                    stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})
    log, until = tmp_path / "run" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("loss") > 2):
        assert time.monotonic() < until and torchrun.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.1)
    workers = children(torchrun.pid)
    assert len(workers) == 2
    torchrun.send_signal(sig)
    assert torchrun.wait(60) == status
    while any(map(alive, workers)) and time.monotonic() < until:
        time.sleep(0.1)
    left = [pid for pid in workers if alive(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    text = (tmp_path / "said").read_text()
    assert not left and text.count(words) == 1, text
    assert load_checkpoint(tmp_path / "run")["step"] % 2 == 0  # whole steps alone are saved


def test_what_all_processes_find_is_said_once(tiny, tmp_path):
    """Before they form a group, where each looks for itself."""
    said = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
                           str(29900 + os.getpid() % 90), str(ROOT / "evaluate.py"), "retrieval", *tiny.common(),
                           "--checkpoint", "none", "--json", "/proc/x.json"], capture_output=True, text=True).stderr
    assert said.count("error: --json /proc/x.json can't be written") == 1, said


def test_what_one_process_finds_is_said_by_it(monkeypatch, capsys):
    """After it left the first one the time to say the same, upon which torchrun would end this one."""
    waits = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    for argv in (["retrieval", "--dataset", "nosuch"], ["retrieval", "--json", "/proc/x.json"]):
        with pytest.raises(SystemExit) as end:
            cli.command_line(lambda argv=argv: evaluate.evaluate(evaluate.arguments(
                [*argv, "--videos", "v", "--flow", "f", "--checkpoint", "none"])))
        assert end.value.code == 2 and len(capsys.readouterr().err) > 20
    assert waits == [2, 2]


def test_bad_input_is_said_by_one_process(tiny, forked, tmp_path):
    said = in_two_processes(forked, tmp_path / "said", "pretrain", *command(tiny, "--lambda1", "0"), "--out",
                            tmp_path / "run", status=(2, 2))
    assert said.count("error: --lambda1: 0 must be a number above 0") == 1
