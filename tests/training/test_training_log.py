"""What a run counts, when it warns or stops, and what may change when it is continued."""

import math
import signal
from pathlib import Path

import pytest
import torch
from helpers.small_runs import log_lines
from helpers.training import made, poisoned, settings, train

import data
import pretrain
from support import training_log
from support.checkpoints import load_checkpoint, save_checkpoint
from support.errors import BadInput


def new_log(before=None, world=1, **k):
    """A Log of 10 steps, 2 an epoch, of 100 prototypes."""
    return training_log.Log(Path("run"), settings(**k), 0, world, 0, 10, 2, math.log(100), before)


def test_a_full_disk_is_an_error_message():
    """/dev/full: what is written to it finds no room."""
    log = new_log()
    log.file = open("/dev/full", "a", buffering=1)
    log.add(torch.tensor(2.0), [""], 8)
    with pytest.raises(BadInput, match=r"run/log\.jsonl can't be written \(No space left on device\): make room"):
        log.line(1, {"entropy": 1.0, "prototypes_in_use": 9, "lr": 0.1, "rank": 5.0})


# --- time ------------------------------------------------------------------------------------------------------------
class Clock:
    """In place of time: it stands until it is moved."""

    now = 100.0

    def perf_counter(self):
        return self.now


def test_the_log_knows_what_it_waited_for_and_how_fast_it_is(monkeypatch, capsys, tmp_path):
    """Two steps of 8 videos: 3 of 4 seconds and then 0 of 1 second in the loader; a line each, and the rest."""
    clock = Clock()
    monkeypatch.setattr(training_log, "time", clock)
    log = new_log()
    log.path = tmp_path / "log.jsonl"
    log.start({"step": 0})
    values = {"entropy": 1.0, "prototypes_in_use": 9, "lr": 0.1, "rank": 5.0}
    for step, (waited, computed) in enumerate([(3, 1), (0, 1)], 1):

        def loader(waited=waited):
            clock.now += waited
            yield "batch"

        assert next(log.timed(loader())) == "batch"
        clock.now += computed
        log.add(torch.tensor(2.0), [""], 8)
        log.line(step, values)
    lines = log_lines(tmp_path)
    assert [(line["data_wait"], line["samples_per_s"]) for line in lines] == [(0.75, 2.0), (0.0, 8.0)]
    said = capsys.readouterr().out.splitlines()
    assert "2.0 videos/s  waiting for data 75%" in said[0] and said[0].endswith("left 0:00:36")
    assert "8.0 videos/s  waiting for data 0%" in said[1] and said[1].endswith("left 0:00:20")  # 5 s for 2 of 10


@pytest.mark.parametrize(("kind", "unit"), [("cpu", "process-hours"), ("cuda", "GPU-hours")])
def test_the_plan_leaves_out_the_first_step_and_counts_all_processes(monkeypatch, capsys, kind, unit):
    """10 s, then 2 s a step; 1800 steps in 4 processes."""
    clock = Clock()
    monkeypatch.setattr(training_log, "time", clock)
    log = training_log.Log(Path("run"), settings(), 0, 4, 0, 1800, 2, 1.0)
    for step, seconds in enumerate((10, 2, 2, 2), 1):
        clock.now += seconds
        assert log.planned(step, kind) == (step == 4)
    assert capsys.readouterr().out == (f"a step takes 2.00 s, all that are left 1:00:00 and 4.0 {unit}; nothing was "
                                       f"written\n")


def test_a_plan_of_long_steps_times_one_and_says_what_helps_on_a_cpu(monkeypatch, capsys):
    clock = Clock()
    monkeypatch.setattr(training_log, "time", clock)
    log = training_log.Log(Path("run"), settings(), 0, 1, 0, 100, 2, 1.0)
    clock.now += 36
    assert log.planned(1, "cpu")
    said = capsys.readouterr().out
    assert "a step takes 36.00 s, timed on the first one alone, all that are left 1:00:00 and 1.0 process-hours" in said
    assert "@presets/cpu, or a smaller --size, --frames, --width and --batch-size, and --short-crops 0" in said


# --- collapse --------------------------------------------------------------------------------------------------------
WELL = {"epoch": 3.0, "loss": 4.0, "rank": 9.0, "prototypes_in_use": 80, "effective_rank_rgb": 9.0,
        "effective_rank_flow": 12.0, "prototypes_in_use_rgb": 60, "prototypes_in_use_flow": 70}
LN_N = math.log(100)


def warnings(line, **settings):
    """What a log of 150 epochs, 2 of them warm-up, says of a line that stays for 60 epochs."""
    log = new_log(warmup_epochs=2, epochs=150, **settings)
    assert not list(log.collapse(WELL))
    return [message for epoch in range(3, 63) for message in log.collapse({**WELL, "epoch": epoch, **line})]


@pytest.mark.parametrize(("line", "words"), [
    ({}, None), ({"loss": 0.98 * LN_N}, None), ({"loss": 0.995 * LN_N}, "stays at ln N"),
    ({"loss": 1.2 * LN_N}, "stays above ln N"),
    ({"effective_rank_rgb": 2.1}, None), ({"effective_rank_rgb": 1.9}, "the features of rgb have collapsed"),
    ({"effective_rank_flow": 1.9}, "the features of flow have collapsed"), ({"prototypes_in_use": 21}, None),
    ({"prototypes_in_use": 20}, "in use (60 in rgb, 70 in flow), of 80 before"),
    ({"prototypes_in_use": 3}, "in use (60 in rgb, 70 in flow), of 80 before"),
    ({"epoch": 2.0, "loss": LN_N, "effective_rank_rgb": 1.0, "prototypes_in_use": 1}, None)])  # the warm-up
def test_each_sign_of_collapse_is_said_once_beyond_its_threshold(line, words):
    said = warnings(line)
    assert len(said) == (words is not None) and all(words in message for message in said)


@pytest.mark.parametrize(("line", "patience"), [
    ({"loss": LN_N}, 50), ({"effective_rank_rgb": 1.0}, 50), ({"loss": 2 * LN_N}, 50), ({"prototypes_in_use": 1}, 0)])
def test_where_every_run_starts_is_said_only_where_it_lasts(line, patience):
    """A third of the epochs; a sign that went away begins anew, also across a stop."""
    log = new_log(warmup_epochs=2, epochs=150)
    for epoch in range(1, 52):
        said = list(log.collapse({**WELL, **line, "epoch": epoch}))
        assert bool(said) == (patience == 0 and epoch == 3)
    list(log.collapse({**WELL, "epoch": 52}))
    log = new_log(log.state(), warmup_epochs=2, epochs=150)
    first = [epoch for epoch in range(53, 200) if list(log.collapse({**WELL, **line, "epoch": epoch}))]
    assert first == ([103] if patience else [])
    again = new_log(log.state(), warmup_epochs=2, epochs=150)
    assert not list(again.collapse({**WELL, **line, "epoch": 300}))


def test_a_warning_names_the_fault_and_what_helps():
    rgb = {"effective_rank_rgb": 1.2}
    assert "flow has learned and this view not: a lower --lr and more --epochs, or --lead flow --lead-epochs E" in \
        warnings(rgb)[0]
    assert "effective rank 1.2 since epoch 3" in warnings(rgb)[0]
    assert "--lead flow with more --lead-epochs" in warnings(rgb, lead="flow")[0]
    assert "--lead" not in warnings(rgb, method="sep")[0]
    both = warnings({**rgb, "effective_rank_flow": 1.3})
    assert len(both) == 2 and all("so have the other view's" in words and "--lead flow" in words for words in both)


def test_one_or_two_prototypes_are_a_collapse_even_from_the_start_and_the_most_ever_is_kept():
    for used, collapsed in ((1, True), (2, True), (3, False)):
        assert bool(list(new_log().collapse({**WELL, "epoch": 99, "prototypes_in_use": used}))) == collapsed
    log = new_log()
    list(log.collapse({**WELL, "epoch": 0.5, "prototypes_in_use": 90}))  # also in the warm-up
    assert log.state()["most"] == 90
    line = {**WELL, "epoch": 99, "prototypes_in_use": 22}
    assert len(list(new_log(log.state()).collapse(line))) == 1 and not list(new_log().collapse(line))


# --- steps without a finite gradient ---------------------------------------------------------------------------------
def test_bad_steps_that_good_ones_part_do_not_stop_a_run(tiny, tmp_path, monkeypatch, capsys):
    """Seven of ten, never five in a row."""
    poisoned(monkeypatch, {1, 2, 3, 4, 6, 7, 8})
    assert train(tiny, tmp_path / "run") == 0
    assert [line["dropped"] for line in log_lines(tmp_path / "run")] == [2, 4, 7, 7]
    assert "7 steps had a gradient that was not finite" in capsys.readouterr().out


def stopped_after(monkeypatch, tiny, out, steps):
    """Train until so many steps are done in this start, then ask to stop."""
    count, real = iter(range(1, 99)), pretrain.step_loss

    def step_loss(*args):
        if next(count) == steps:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "step_loss", step_loss)
        assert train(tiny, out) == 128 + signal.SIGTERM


def test_bad_steps_are_counted_across_a_stop(tiny, tmp_path, monkeypatch, capsys):
    """Three before it and one after are four of them in all; three before and two after are five in a row."""
    real = data.augment
    poisoned(monkeypatch, {0, 1, 2})
    stopped_after(monkeypatch, tiny, tmp_path / "run", 3)
    assert load_checkpoint(tmp_path / "run")["step"] == 3
    stopped = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(data, "augment", real)
    poisoned(monkeypatch, {0})
    assert train(tiny, tmp_path / "run") == 0
    assert log_lines(tmp_path / "run")[-1]["dropped"] == 4
    assert "4 steps had a gradient that was not finite" in capsys.readouterr().out
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "checkpoint.pt").write_bytes(stopped)
    monkeypatch.setattr(data, "augment", real)
    poisoned(monkeypatch, {0, 1})  # noticed before the next line of the log, at step 6
    with pytest.raises(BadInput, match="not finite in the last 5 steps before step 5"):
        train(tiny, tmp_path / "again")


# --- videos that can't be read ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(("share", "videos", "most"), [(0.1, 20, 2), (0.1, 29, 2), (0.0, 20, 1),
                                                       (0.01, 20, 1), (1, 5, 5)])
def test_the_share_of_unreadable_videos_that_stops_a_run(share, videos, most):
    log = new_log(max_faults=share)
    log.add(torch.tensor(1.0), [f"{k}.avi is empty" for k in range(most)], 8)
    assert log.too_many_faults(videos) is None
    log.add(torch.tensor(1.0), ["", "0.avi is empty", "one.avi is empty"], 8)
    said = log.too_many_faults(videos)
    assert said.startswith(f"{most + 1} of {videos} videos could not be read, more than --max-faults {share:g} allows")
    assert "the first: 0.avi is empty" in said


def test_unreadable_videos_of_all_processes_count_once_and_across_a_stop(monkeypatch, capsys):
    def gather(everyone, own):
        everyone[:] = [own, ["b", "c"]]

    monkeypatch.setattr(training_log.dist, "all_gather_object", gather)
    monkeypatch.setattr(training_log.dist, "all_reduce", lambda losses: losses.mul_(2))
    log = new_log(world=2, max_faults=0.1)
    log.add(torch.tensor(1.5), ["a", "", "b"], 8)
    assert capsys.readouterr().err.count("skipped: ") == 2
    state = log.state()
    assert state["faults"] == ["a", "b", "c"] and state["losses"].tolist() == [1.5]
    assert log.too_many_faults(30) is None and "3 of 29" in log.too_many_faults(29)
    again = new_log(state, max_faults=0.1)
    again.add(torch.tensor(1.0), ["c"], 8)
    assert "skipped" not in capsys.readouterr().err and "3 of 29" in again.too_many_faults(29)


# --- what may change on resume ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A folder with a run of 2 steps in one process, and the same as if without synchronised batch norm."""
    root = tmp_path_factory.mktemp("runs")
    assert train(tiny, root / "run", "--epochs", "2") == 0
    state = load_checkpoint(root / "run")
    state["settings"]["sync_batch_norm"] = False
    (root / "apart").mkdir()
    save_checkpoint(root / "apart" / "checkpoint.pt", state)
    return root


APART = ["--no-sync-batch-norm"]


@pytest.mark.parametrize(("more", "world", "words"), [
    ([], 1, None), (["--workers", "3", "--log-every", "2", "--save-every", "5", "--keep", "9", "--cache"], 1, None),
    (["--recompute", "--time-limit", "5", "--max-faults", "1", "--timeout", "5", "--device", "cpu"], 1, None),
    (["--seed", "1"], 1, "seed 0 -> 1"), (["--lr", "0.25"], 1, "lr 0.5.* -> 0.25"),
    (["--epochs", "3"], 1, "epochs 2 -> 3"), (["--batch-size", "4"], 1, "batch_size 8 -> 4"),
    (["--accumulate", "2"], 1, "accumulate 1 -> 2"), (["--split", "2"], 1, "split 1 -> 2"),
    (["--keep-last"], 1, "keep_last False -> True"), (["--temperature", "0.2"], 1, "temperature 0.1 -> 0.2"),
    (["--batch-size", "4"], 2, None), (["--batch-size", "8"], 2, "global_batch 8 -> 16"), (APART, 1, None),
    ([*APART, "--batch-size", "4"], 2, "batch_size 8 -> 4"), ([*APART, "--seed", "1"], 1, "seed 0 -> 1")])
def test_what_may_change_when_a_run_is_continued(tiny, run, tmp_path, monkeypatch, more, world, words):
    """The share of a process may, of the same whole batch, where batch norm does not tell."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    (tmp_path / "trainlist02.txt").write_text((tiny.splits / "trainlist01.txt").read_text())
    for name in ("trainlist01", "classInd"):
        (tmp_path / f"{name}.txt").write_text((tiny.splits / f"{name}.txt").read_text())
    flags = ["--epochs", "2", "--out", str(run / ("apart" if "--no-sync-batch-norm" in more else "run")), "--splits",
             str(tmp_path), *more]
    if words is None:
        assert made(tiny, tmp_path, monkeypatch, *flags, world=world).start == 4
        return
    with pytest.raises(BadInput, match=rf"was trained with other settings \(.*{words}"):
        made(tiny, tmp_path, monkeypatch, *flags, world=world)
