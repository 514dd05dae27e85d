"""What a run keeps in its folder, and how it is read again: damage, a failing disk, two runs at once, other inputs."""

import errno
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.small_runs import command
from helpers.training import log, run, weights

import pretrain
from support import checkpoints, locks
from support.checkpoints import last_checkpoint, load_checkpoint, lock, save_checkpoint, save_run
from support.errors import BadInput, TemporaryFailure
from support.files import save_arrays


@pytest.fixture(scope="module")
def complete(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("complete")
    assert run(tiny, out) == 0
    return out


@pytest.fixture
def two(complete, tmp_path):
    """A complete run with its two checkpoints, of steps 4 and 2."""
    return shutil.copytree(complete, tmp_path / "run")


def steps(out):
    return {p.name: load_checkpoint(p)["step"] for p in out.glob("checkpoint*.pt") if "damaged" not in p.name}


def cut(file):
    file.write_bytes(file.read_bytes()[:-1000])


def test_a_checkpoint_that_cannot_be_set_aside_is_an_error_message(two):
    state = load_checkpoint(two)
    (two / "checkpoint.1.pt").unlink()
    (two / "checkpoint.1.pt").mkdir()  # where the one before should go
    with pytest.raises(BadInput, match=r"checkpoint\.pt can't be written \(Is a directory\): make room, and the same"):
        save_run(two, state, 2)
    assert load_checkpoint(two / "checkpoint.new.pt")["step"] == state["step"]  # nothing is lost


# --- a process that sees something else ------------------------------------------------------------------------------
def test_all_processes_continue_from_what_the_first_one_read(tiny, forked, tmp_path):
    argv = command(tiny, "--batch-size", "4", "--epochs", "2", "--save-minutes", "1e-9")
    forked("node_local", argv=argv, root=tmp_path, said=tmp_path / "said")
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize(("others", "words"), [
    (["--lambda2", "0.01"], "error: the processes were not started alike (process 1: lambda2 0.01, not 0.03)"),
    (["--flow", "absent"], "error: absent is no flow store")])
def test_processes_that_were_not_started_alike_say_so_once(tiny, forked, tmp_path, others, words):
    forked("apart", argv=command(tiny, "--batch-size", "4", "--out", str(tmp_path / "run")), others=others,
           said=tmp_path / "said", status=[2, 2])
    said = (tmp_path / "said0").read_text() + (tmp_path / "said1").read_text()
    assert said.count(words) == 1 == said.count("error:") and "Traceback" not in said, said


# --- what can't be read ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("error", "status"), [
    (OSError(errno.EIO, "Input/output error"), 75), (OSError(errno.ESTALE, "Stale file handle"), 75),
    (PermissionError(errno.EACCES, "Permission denied"), 2), (MemoryError(), 75)])
def test_a_checkpoint_that_may_be_good_is_not_passed_over(tiny, two, monkeypatch, error, status):
    real = Path.read_bytes

    def read(path):
        if path == two / "checkpoint.pt":
            raise error
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    before = {p: real(p) for p in two.glob("*.pt")}
    with pytest.raises(BadInput, match=r"checkpoint\.pt .*may be good") as raised:
        run(tiny, two)
    assert raised.value.status == status
    assert {p: real(p) for p in two.glob("*.pt")} == before


def test_torch_short_of_memory_is_no_damage(tiny, two, monkeypatch):
    def load(*args, **kwargs):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(TemporaryFailure, match="does not fit into the memory"):
        run(tiny, two)


@pytest.mark.parametrize(("content", "why"), [(b"", "it is empty"), (b"PK" + bytes(500), "cut off or overwritten"),
                                              (b"text", "cut off or overwritten")])
def test_damage_is_said_in_our_own_words(tmp_path, content, why):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(BadInput, match=why) as raised:
        load_checkpoint(tmp_path)
    assert "weights_only" not in str(raised.value)


# --- what is kept ----------------------------------------------------------------------------------------------------
def test_a_damaged_file_never_takes_the_place_of_a_good_one(two, monkeypatch):
    """Killed before any rename of the save that follows, the run still has the checkpoint that it continued from."""
    cut(two / "checkpoint.pt")
    state = last_checkpoint(two, keep=2)
    assert state["step"] == 2 and steps(two) == {"checkpoint.pt": 2}
    assert (two / "checkpoint.damaged.pt").exists()

    def killed(*args):
        raise KeyboardInterrupt

    for moment in ("link", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.os, moment, killed)
            with pytest.raises(KeyboardInterrupt):
                save_run(two, {**state, "step": 3}, keep=2)
        assert steps(two)["checkpoint.pt"] == 2
    save_run(two, {**state, "step": 3}, keep=2)
    assert steps(two) == {"checkpoint.pt": 3, "checkpoint.1.pt": 2}


def test_reading_alone_changes_no_file(two, capsys):
    cut(two / "checkpoint.pt")
    before = {p: p.read_bytes() for p in two.iterdir()}
    assert last_checkpoint(two)["step"] == 2
    assert {p: p.read_bytes() for p in two.iterdir()} == before
    assert "checkpoint.pt is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("lost", [[], ["checkpoint.pt"], ["checkpoint.pt", "checkpoint.1.pt"]])
def test_a_checkpoint_that_was_whole_but_not_yet_renamed_is_the_newest(two, lost):
    """Also where it is the only good one."""
    save_checkpoint(two / "checkpoint.new.pt", {"step": 7})
    for name in lost:
        cut(two / name)
    assert last_checkpoint(two, keep=2)["step"] == 7
    assert load_checkpoint(two)["step"] == 7 and not (two / "checkpoint.new.pt").exists()


def test_a_whole_one_that_was_damaged_before_its_renaming_is_set_aside(two):
    (two / "checkpoint.new.pt").write_bytes(b"PK")
    assert last_checkpoint(two, keep=2)["step"] == 4
    assert steps(two) == {"checkpoint.pt": 4, "checkpoint.1.pt": 2}
    assert (two / "checkpoint.new.damaged.pt").exists()


# --- two runs --------------------------------------------------------------------------------------------------------
class AnotherRun:
    """Another process that has the lock of a run's folder until `end`."""

    def __init__(self, folder):
        fork = multiprocessing.get_context("fork")
        self.locked, self.ended = fork.Event(), fork.Event()
        self.process = fork.Process(target=self.hold, args=(folder,), daemon=True)
        self.process.start()
        self.locked.wait(60)

    def hold(self, folder):
        held = lock(folder)
        self.locked.set()
        self.ended.wait(60)
        held.close()

    def end(self):
        self.ended.set()
        self.process.join()


def test_a_second_run_in_the_same_folder_is_refused(tiny, two):
    other = AnotherRun(two)
    (two / ".tmp-other.pt").write_bytes(b"")  # it is writing
    with pytest.raises(BadInput, match=rf"another run is training in .*\(process {other.process.pid} on .*\): wait"):
        run(tiny, two, "--epochs", "2")
    assert run(tiny, two, "--plan") == 0
    assert (two / ".tmp-other.pt").exists()
    other.end()
    assert run(tiny, two) == 0 and not (two / ".tmp-other.pt").exists()


def test_a_run_that_was_killed_leaves_no_lock_with_its_loader_processes(two):
    """They live on for some seconds."""
    held = lock(two)
    child = os.fork()
    if not child:
        time.sleep(20)
        os._exit(0)
    held.close()
    other = AnotherRun(two)
    other.end()
    os.kill(child, 9), os.waitpid(child, 0)
    assert other.locked.is_set() and other.process.exitcode == 0


def test_one_that_is_started_again_waits_for_its_last_processes(tiny, two, monkeypatch):
    s = pretrain.arguments([*command(tiny), "--out", str(two)])
    assert checkpoints.lock_timeout(s) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert checkpoints.lock_timeout(s) == 120
    other = AnotherRun(two)
    with pytest.raises(TemporaryFailure, match="another run is training"):  # Slurm then starts it once more
        lock(two, 0.1)
    monkeypatch.setattr(checkpoints.time, "sleep", lambda seconds: other.end())
    lock(two, 100).close()


def test_without_locks_a_sentence_is_all(tiny, two, monkeypatch, capsys):
    def fails(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "lockf", fails)
    (two / ".tmp-other.pt").write_bytes(b"")
    assert run(tiny, two) == 0
    assert "can't be locked (No locks available); see to it that no two runs" in capsys.readouterr().err
    assert (two / ".tmp-other.pt").exists()


# --- other inputs ----------------------------------------------------------------------------------------------------
def test_other_prototypes_of_the_same_shape_are_refused_unless_they_are_learned(tiny, two, tmp_path):
    other = tmp_path / "other.npz"
    save_arrays(other, "prototypes", {}, prototypes=torch.randn(24, 16).numpy())
    with pytest.raises(BadInput, match=r"other prototypes: 24 of the 24 in --prototypes .*other\.npz differ"):
        run(tiny, two, "--prototypes", str(other))
    learned = tmp_path / "learned"
    assert run(tiny, learned, "--train-prototypes", "--epochs", "1") == 0
    assert run(tiny, learned, "--train-prototypes", "--epochs", "1", "--prototypes", str(other)) == 0


# --- the log ---------------------------------------------------------------------------------------------------------
def test_lines_of_the_log_that_are_not_ours_are_named_and_kept_aside(tiny, two, capsys):
    whole = log(two)
    state = load_checkpoint(two / "checkpoint.1.pt")
    save_run(two, state, 1)
    torn = (two / "log.jsonl").read_bytes() + b'{"step": 4, "lo'
    (two / "log.jsonl").write_bytes(b'{"loss": 1}\n[1, 2]\n\xff\xfe\n"step"\n' + torn)
    assert run(tiny, two) == 0
    assert "log.jsonl has 4 damaged line(s), left out; the file as it was is" in capsys.readouterr().err
    assert b"[1, 2]" in (two / "log.damaged.jsonl").read_bytes()
    assert [line["step"] for line in log(two)] == [0, 1, 2, 2, 3, 4] and log(two)[:3] == whole[:3]


def test_a_folder_in_the_place_of_the_log_is_named(tiny, tmp_path):
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    with pytest.raises(BadInput, match=r"log\.jsonl can't be read \(Is a directory\)"):
        run(tiny, tmp_path / "run")


def test_a_complete_run_gets_no_further_line(tiny, two):
    before = (two / "log.jsonl").read_bytes()
    assert run(tiny, two) == 0
    assert (two / "log.jsonl").read_bytes() == before
    assert json.loads(before.splitlines()[-1])["step"] == 4


# --- saving by time --------------------------------------------------------------------------------------------------
def test_a_run_is_saved_within_an_epoch_and_continues_in_the_same_bits(tiny, two, tmp_path, monkeypatch):
    real, saved, done = pretrain.step_loss, [], iter(range(100))
    save = save_run
    monkeypatch.setattr(pretrain, "save_run", lambda out, state, keep: (saved.append(state["step"]),
                                                                    save(out, state, keep)))
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "step_loss", lambda *args: real(*args) if next(done) < 3 else sys.exit(1))
        with pytest.raises(SystemExit):
            run(tiny, tmp_path / "timed", "--save-minutes", "1e-9")
    assert saved == [1, 2, 3]
    assert run(tiny, tmp_path / "timed", "--save-minutes", "0") == 0
    assert saved == [1, 2, 3, 4]
    a, b = weights(two), weights(tmp_path / "timed")
    assert all(torch.equal(a[k], b[k]) for k in a)
