"""Runs that are killed, in several processes or one, on a full disk, and end as if nothing had been."""

import signal
from itertools import chain

import pytest
import torch
from helpers.small_runs import command, log_lines

import model
import pretrain
from support import signals, watchdog
from support.checkpoints import load_checkpoint
from support.epoch_batches import EpochBatches
from support.errors import EXIT_LOST, BadInput
from support.signals import StopSignals
from support.watchdog import Watchdog


def test_killed_at_20_random_points_a_run_ends_in_the_same_bits(tiny, forked, tmp_path):
    """SIGKILL, half at named moments of a step and of saving; newest files cut; weights, optimizer and log equal."""
    forked("kills", argv=command(tiny), root=tmp_path, count=20, seed=0)


# --- several processes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("method", "world", "videos", "more"), [
    ("goca", 2, 6, []), ("sep", 2, 6, []), ("goca", 3, 7, []), ("vicc", 2, 6, ["--train-prototypes"])])
def test_processes_have_the_loss_and_gradients_of_one(forked, tmp_path, method, world, videos, more):
    """gloo; even and uneven parts against the whole batch; batch norm and the assignment included; float64."""
    forked("gradients", method=method, world=world, videos=videos, more=more, said=tmp_path / "said")


@pytest.mark.parametrize("rows", [(3, 4), (5, 1, 2)])
def test_batch_norm_on_gpus_is_that_of_one_process(forked, tmp_path, rows):
    """The messages and what is made of them, with stand-ins for the five kernels."""
    forked("gpu_batch_norms", rows=rows, said=tmp_path / "said")


def test_1_2_and_3_processes_train_alike_on_an_uneven_last_batch(tiny, forked, tmp_path):
    """20 videos in batches of 12 and 8 (3 processes: 3 + 3 + 2): losses, learning rates, weights, batch norm."""
    forked("shares", argv=command(tiny, "--epochs", "2", "--keep-last", "--log-every", "1"), root=tmp_path, batch=12,
           worlds=[1, 2, 3])
    logs = [log_lines(tmp_path / str(w)) for w in (1, 2, 3)]
    ends = [load_checkpoint(tmp_path / str(w))["model"] for w in (1, 2, 3)]
    assert len(logs[0]) == 4
    settings = load_checkpoint(tmp_path / "1")["settings"]
    start = model.two_view(settings, ends[0]["prototypes"]).state_dict()
    for log, state in zip(logs[1:], ends[1:], strict=True):
        for a, b in zip(logs[0], log, strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-6) and b["lr"] == a["lr"]
        for name, w in ends[0].items():
            moved = (w - start[name]).float().norm()
            assert (state[name] - w).float().norm() <= 1e-4 * moved + 1e-6, name


def test_batches_keep_the_uneven_rest():
    for world in (1, 2, 3):
        parts = [list(EpochBatches(20, 12 // world, 2, rank=r, world=world, keep_last=True)) for r in range(world)]
        whole = [list(chain(*step)) for step in zip(*parts, strict=True)]
        assert [len(b) for b in whole] == [12, 8, 12, 8]
        assert sorted(i for _, i in whole[0] + whole[1]) == list(range(20))
        batches = EpochBatches(20, 12 // world, 2, world=world, keep_last=True)
        assert [batches.rows(1)[r] for r in range(world)] == [len(p[1]) for p in parts]
    assert EpochBatches(20, 6, 1, world=3, keep_last=True).steps_per_epoch == 1  # a rest of 2 is too few
    assert EpochBatches(20, 6, 1, world=2, keep_last=True).steps_per_epoch == 2
    assert EpochBatches(21, 10, 1, keep_last=True).steps_per_epoch == 2  # nor is one video a batch


def test_a_dying_process_under_torchrun_is_started_again_and_nothing_is_lost(tiny, forked, tmp_path):
    forked("restarts", argv=command(tiny, "--batch-size", "4", "--epochs", "2", "--timeout", "20"),
           whole=tmp_path)


@pytest.mark.parametrize(("disturbance", "status", "words"), [
    ("hang", [75, 75], ["did not finish step 2 in 10 s (--timeout); it is at", "in hang"]),
    ("die", [75, 1], ["process 0 lost the others ("]),
    ("starve", [75, 2], ["error: out of memory (CUDA out of memory. Tried to allocate 2 GiB) with --batch"]),
    ("warn", [128 + signal.SIGUSR1] * 2, ["asked to stop (signal 10): saved step 2 of 10"])])
def test_what_becomes_of_two_processes_when_one_is_disturbed(tiny, forked, tmp_path, disturbance, status, words):
    """In step 2 one hangs, dies, lacks memory, or gets Slurm's warning: each leaves with its status and a message."""
    argv = command(tiny, "--batch-size", "4", "--timeout", "10", "--out", str(tmp_path / "run"))
    forked("disturb", argv=argv, said=tmp_path / "said", disturbance=disturbance, step=2, status=status)
    said = (tmp_path / "said0").read_text() + (tmp_path / "said1").read_text()
    assert all(w in said for w in words) and "Traceback" not in said, said
    if disturbance == "warn":
        assert load_checkpoint(tmp_path / "run")["step"] == 2


# --- disk and memory -------------------------------------------------------------------------------------------------
def test_a_full_disk_keeps_the_checkpoint_before(tiny, forked, tmp_path):
    forked("full_disk", argv=command(tiny, "--epochs", "2"), out=tmp_path, said=tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert "error: step 4 could not be saved" in said and "File too large" in said and "Traceback" not in said
    assert f"{tmp_path / 'run' / 'checkpoint.pt'} is the one before" in said


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), None])
def test_out_of_memory_names_what_helps(tiny, tmp_path, monkeypatch, error):
    def too_large(*args):
        if error:
            raise error
        torch.empty(2**50)  # what a CPU says

    monkeypatch.setattr(pretrain, "step_loss", too_large)
    with pytest.raises(BadInput, match=r"out of memory \(.*memory.*\) with --batch-size 8, each video in both "
                                       r"views of 2 crops of 4 .*--recompute .*--batch-size 4 --accumulate 2 .*"
                                       r"--short-crops, --short-frames or --frames, a smaller --size"):
        pretrain.train(pretrain.arguments(command(tiny, "--out", str(tmp_path / "run"))))


def test_a_checkpoint_that_would_run_code_is_refused_and_not_run(tiny, tmp_path, capsys):
    class Malicious:
        def __reduce__(self):
            return print, ("executed!",)

    (tmp_path / "run").mkdir()
    torch.save({"kind": "checkpoint", "version": 1, "step": Malicious()}, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(BadInput, match="damaged or no checkpoint"):
        pretrain.train(pretrain.arguments(command(tiny, "--out", str(tmp_path / "run"))))
    assert "executed" not in capsys.readouterr().out


# --- signals ---------------------------------------------------------------------------------------------------------
def test_a_second_ctrl_c_ends_all_unless_it_is_torchruns_echo(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
        clock[0] += 0.1
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        clock[0] += 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_the_watchdog_counts_only_while_it_is_not_beaten(monkeypatch, capsys):
    left = []
    monkeypatch.setattr(watchdog.os, "_exit", lambda status: (left.append(status), dog.over.set()))
    with Watchdog(0.4, 3, 7, "Advice") as dog:
        for step in range(8, 12):
            assert not dog.over.wait(0.2)
            dog.beat(step)
        dog.over.wait(30)
    assert left == [EXIT_LOST]
    said = capsys.readouterr().err
    assert "process 3 did not finish step 12 in 0.4 s (--timeout)" in said and "Advice" in said
