"""What processes say and agree on, and what they take for a lost one; the parts for GPUs with stand-ins."""

import argparse

import pytest
import torch
import torch.distributed as dist

from support import watchdog
from support.distributed import MaxOverRanks, start_processes
from support.errors import EXIT_LOST, BadInput
from support.run import named_failures
from support.watchdog import Watchdog, is_peer_failure


def test_processes_agree_on_signals_and_timers_at_once_or_a_step_late(forked, tmp_path):
    forked("agreements", said=tmp_path / "said")


def test_one_process_agrees_with_itself():
    assert MaxOverRanks(torch.device("cpu"), 1)(15, True, torch.tensor(3)) == [15, True, 3]
    late = MaxOverRanks(torch.device("cpu"), 1, late=True)  # as on a GPU
    assert [late(n, torch.tensor(10 * n)) for n in (1, 2, 3)] == [[0, 0], [1, 10], [2, 20]]


@pytest.mark.parametrize("error", [
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or a network error"),
    dist.DistNetworkError("The client socket has timed out after 600000ms"), RuntimeError("Socket Timeout"),
    RuntimeError("NCCL communicator was aborted on rank 3."),
    RuntimeError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE)"),
    RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3")])
def test_a_lost_process_is_known_by_the_words_of_gloo_and_nccl(error):
    assert is_peer_failure(error)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: an illegal memory access was encountered"),
                                   RuntimeError("shape '[2]' is invalid for input of size 3")])
def test_other_errors_are_none(error):
    assert not is_peer_failure(error)


@pytest.mark.parametrize(("error", "words"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
     r"out of memory \(CUDA out of memory.*\) with --batch-size 3"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                  "are out of shared memory"), r"out of shared memory\).*--shm-size or --ipc=host, or --workers 0")])
def test_what_a_run_lacks_is_named(error, words):
    with pytest.raises(BadInput, match=words), named_failures("--batch-size 3", 600):
        raise error


def test_lost_processes_are_named_where_there_are_others(monkeypatch, capsys):
    lost = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3")
    with pytest.raises(RuntimeError, match="Connection closed"), named_failures("", 600):
        raise lost
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left, named_failures("", 600):
        raise lost
    assert left.value.code == EXIT_LOST and "error: process 1 lost the others (" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="invalid for input"), named_failures("", 600):
        raise RuntimeError("shape '[2]' is invalid for input of size 3")


@pytest.mark.parametrize(("environment", "words"), [
    ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}, "8 processes on this machine want a GPU each, but torch sees 2"),
    ({"LOCAL_RANK": "5"}, "6 processes on this machine want a GPU each, but torch sees 2")])
def test_more_processes_than_gpus_are_refused(monkeypatch, environment, words):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BadInput, match=words) as raised:
        start_processes(argparse.Namespace(device="auto", timeout=600))
    assert bool(raised.value.printed) == ("LOCAL_WORLD_SIZE" in environment)  # the first of the machine says it


def test_the_watchdog_gives_a_step_that_compiles_more_time(monkeypatch, capsys):
    left = []
    monkeypatch.setattr(watchdog.os, "_exit", lambda status: (left.append(status), dog.over.set()))
    with Watchdog(0.3, 0, 0, "") as dog:
        dog.compiling()
        assert not dog.over.wait(0.9)
        dog.beat(1)
        assert dog.over.wait(30)
    assert left == [EXIT_LOST] and "did not finish step 2 in 0.3 s" in capsys.readouterr().err
