"""The training loop: its runs against themselves (a step: test_step.py)."""

import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers.evaluation import in_two_processes
from helpers.paths import ROOT
from helpers.training import S3D, SMALL, log, poisoned, run, settings, weights

import data
import goca
import model
import pretrain
from support.checkpoints import load_checkpoint, save_run
from support.datasets import read_split
from support.errors import BadInput
from support.files import load_arrays, save_arrays
from support.optim import rate_rule
from support.video_index import scan
from support.watchdog import Watchdog


# --- runs ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """An uninterrupted run of 2 epochs of 2 steps."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(tiny, out) == 0
    return out


def test_log_says_what_to_watch(whole):
    first, *steps = log(whole)
    assert first["ln_n"] == pytest.approx(math.log(24)) and first["settings"]["method"] == "goca"
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    for s in steps:
        assert {"loss", "lr", "entropy", "prototypes_in_use", "views_agree", "samples_per_s", "data_wait", "epoch",
                "skipped", "guided", "prior_views", *(f"{name}_{view}" for view in model.VIEWS for name in (
                    "loss", "effective_rank", "entropy", "prototypes_in_use"))} <= s.keys()
        assert (s["loss_rgb"] + s["loss_flow"]) / 2 == pytest.approx(s["loss"], rel=1e-4)  # a line a step
        assert (s["entropy_rgb"] + s["entropy_flow"]) / 2 == pytest.approx(s["entropy"], rel=1e-5)
        assert min(s["effective_rank_rgb"], s["effective_rank_flow"]) == s["rank"]
        assert 0 < s["loss"] < 10 and 0 < s["entropy"] <= math.log(24) + 1e-6
        assert 0.1 < s["peak_gib"] < 10
    assert steps[1]["epoch"] == 1.0 and steps[-1]["epoch"] == 2.0


def test_training_moves_every_weight_but_the_prototypes(tiny, whole):
    after, s = weights(whole), load_checkpoint(whole)["settings"]
    _, arrays = load_arrays(tiny.prototypes, "prototypes", "")
    before = model.two_view(s, torch.from_numpy(arrays["prototypes"])).state_dict()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert "prototypes" not in moved
    assert {k for k in before if k.endswith("weight")} <= moved


def test_a_second_run_is_bit_identical(tiny, tmp_path):
    """Another process, with loader workers; the paper's backbone."""
    assert run(tiny, tmp_path / "one", *S3D) == 0
    subprocess.run([sys.executable, str(ROOT / "pretrain.py"), *tiny.common(), "--prototypes", str(tiny.prototypes),
                    "--out", str(tmp_path / "two"), *SMALL, *S3D, "--workers", "2"], check=True, capture_output=True)
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_stopping_and_continuing_is_bit_identical(tiny, whole, tmp_path, monkeypatch):
    """Asked to stop in every step, the run is continued until it is done; SIGTERM's own status tells each time."""
    real = pretrain.step_loss

    def interrupt(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(pretrain, "step_loss", interrupt)
    for step in range(1, 5):
        assert run(tiny, tmp_path / "run") == 128 + signal.SIGTERM
        assert load_checkpoint(tmp_path / "run")["step"] == step
    monkeypatch.undo()
    assert run(tiny, tmp_path / "run") == 0  # complete already
    a, b = weights(whole), weights(tmp_path / "run")
    assert all(torch.equal(a[k], b[k]) for k in a)
    losses = lambda out: [s["loss"] for s in log(out) if "loss" in s]  # noqa: E731
    assert losses(tmp_path / "run") == losses(whole)


def test_two_processes_train_on_the_same_global_batches(tiny, whole, forked, tmp_path):
    """2 processes of 5 videos: the first step's loss and assignments are those of one process of 10."""
    in_two_processes(forked, tmp_path / "said", "pretrain", *tiny.common(), "--prototypes", tiny.prototypes, "--out",
                     tmp_path / "run", *SMALL, "--batch-size", "5", "--epochs", "1")
    one, two = log(whole)[1], log(tmp_path / "run")[1]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert two["entropy"] == pytest.approx(one["entropy"], rel=1e-2)
    assert len(log(tmp_path / "run")) == 3 and load_checkpoint(tmp_path / "run")["step"] == 2


def test_trained_prototypes_move_and_stay_on_the_sphere(tiny, whole, tmp_path):
    assert run(tiny, tmp_path / "run", "--train-prototypes", "--epochs", "1") == 0
    before = load_arrays(tiny.prototypes, "prototypes", "")[1]["prototypes"]
    after = weights(tmp_path / "run")["prototypes"]
    assert (after - torch.from_numpy(before)).norm() > 1e-3
    torch.testing.assert_close(after.norm(dim=1), torch.ones(24))


def test_both_backbones_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **how: compiled.append((m, how)))
    s = settings(compile=True, width=0.125, hidden=16)
    net = pretrain.network(s, torch.eye(16), torch.device("cpu"), 1)
    assert compiled == [(m, {"dynamic": False}) for m in net.backbones.values()] and len(compiled) == 2


def test_a_compiled_backbone_trains_alike(tiny, tmp_path, monkeypatch):
    """Traced whole by torch.compile; its own code generator would take minutes. One view, and as many short clips as
    long ones, so that one trace is enough: it takes many times as long as a step."""
    real, longer = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **how: real(m, backend="eager", fullgraph=True, **how))
    monkeypatch.setattr(Watchdog, "compiling", lambda self: longer.append(self))
    more = ["--views", "rgb", "--short-crops", "2", "--epochs", "1"]
    assert run(tiny, tmp_path / "plain", *more) == 0 and not longer
    assert run(tiny, tmp_path / "run", *more, "--compile") == 0
    assert len(longer) == 1  # all steps are alike
    for one, other in zip(log(tmp_path / "plain")[1:], log(tmp_path / "run")[1:], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_guiding_starts_when_asked(tiny, tmp_path):
    assert run(tiny, tmp_path / "run", "--guide-start", "1") == 0
    assert [s["guided"] for s in log(tmp_path / "run")[1:]] == [False, False, True, True]


def test_a_view_leads_in_the_epochs_that_were_asked_for(tiny, tmp_path, monkeypatch):
    """2 steps an epoch; epoch 0 unguided, 1 led by flow, 2 as in the paper: as it reaches the operator, and the log."""
    reached, real = [], goca.guided_loss
    monkeypatch.setattr(goca, "guided_loss", lambda *args, **how: (
        reached.append(how["prior_views"]), real(*args, **how))[1])
    more = ["--epochs", "3", "--guide-start", "1", "--lead", "flow", "--lead-epochs", "2"]
    assert run(tiny, tmp_path / "run", *more) == 0
    assert reached == [(True, False)] * 2 + [(True, True)] * 2
    lines = log(tmp_path / "run")[1:]
    assert [line["prior_views"] for line in lines] == [[False, False]] * 2 + [[True, False]] * 2 + [[True, True]] * 2
    assert [line["guided"] for line in lines] == [False] * 4 + [True] * 2
    with pytest.raises(BadInput, match=r"trained with other settings \(lead_epochs 2 -> 3\)"):
        run(tiny, tmp_path / "run", *more[:-1], "3")


def test_a_backbone_of_one_s_own_is_cropped_as_r2plus1d(tiny, monkeypatch):
    monkeypatch.setitem(model.ARCHITECTURES, "mine", model.R2Plus1D18)
    s = pretrain.arguments([*tiny.common(), "--prototypes", "p", "--out", "o", "--arch", "mine"])
    assert s.scale == list(data.SCALES["r2plus1d18"])


def test_the_rate_of_accumulated_batches_is_that_of_all_their_videos(tiny):
    more = ["--batch-size", "5", "--accumulate", "2"]
    s = pretrain.arguments([*tiny.common(), "--prototypes", "p", "--out", "o", *more])
    assert s.lr == pytest.approx(4.8 * math.sqrt(10 / 640))


def test_a_gradient_that_is_not_finite_is_dropped_and_counted(tiny, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, {3})
    assert run(tiny, tmp_path / "run") == 0
    assert "1 steps had a gradient that was not finite" in capsys.readouterr().out
    assert log(tmp_path / "run")[-1]["dropped"] == 1
    assert all(p.isfinite().all() for p in weights(tmp_path / "run").values())


def test_many_in_a_row_stop_the_run_with_the_last_good_state(tiny, tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(2, 100)))
    with pytest.raises(BadInput, match=r"not finite in the last 5 steps before step 7.*--lr"):
        run(tiny, tmp_path / "run", "--epochs", "5", "--save-every", "1")
    assert load_checkpoint(tmp_path / "run")["step"] <= 6


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tiny, whole, tmp_path, capsys):
    assert run(tiny, tmp_path / "run") == 0
    assert sorted(p.name for p in (tmp_path / "run").glob("*.pt")) == ["checkpoint.1.pt", "checkpoint.pt"]
    newest = tmp_path / "run" / "checkpoint.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert run(tiny, tmp_path / "run") == 0
    said = capsys.readouterr()
    assert f"{newest} is damaged" in said.err and "taking the checkpoint before it" in said.err
    assert "continuing at step 2" in said.out
    again = weights(tmp_path / "run")
    assert all(torch.equal(w, again[name]) for name, w in weights(whole).items())
    for file in (tmp_path / "run").glob("*.pt"):
        file.write_bytes(b"")
    with pytest.raises(BadInput, match="damaged"):
        run(tiny, tmp_path / "run")


def test_plan_says_what_would_be_done_and_writes_nothing(tiny, tmp_path, capsys):
    assert run(tiny, tmp_path / "run", "--plan", "--epochs", "7") == 0
    said = capsys.readouterr().out
    operator = {"compiled": "compiled for cpu", "reference": "PyTorch reference"}[goca.implementation("cpu")]
    assert "2 steps an epoch, 14 in all" in said and "process-hours; nothing was written" in said
    for words in ("goca on ucf101 in", "20 videos (0 listed but absent, 0 without flow)",
                  "both views of 2 crops of 4 and 1 of 4 frames, 16 px; 0 loader processes",
                  "M parameters, float32 on 1 x cpu, ",
                  "24 prototypes, ln N = 3.178; batch 10 x 1", "(7 epochs, 0 videos left out of each)",
                  "learning rate (lars): 4.8 at a batch of 640, scaled by sqrt(10/640); 0.0375 -> 0.6 in 1 epochs",
                  f"assignment and loss: {operator}"):
        assert words in said
    assert not (tmp_path / "run").exists()


def test_collapse_is_said(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(model.TwoView, "scores", lambda self, f: torch.zeros(*f.shape[:-1], 24) + 0 * f.sum())
    assert run(tiny, tmp_path / "run", "--epochs", "4") == 0
    said = capsys.readouterr().out
    message = "the loss, 3.178, stays at ln N = 3.178: the network has learned nothing"
    assert said.count(message) == 1  # not in each of the steps after the warm-up


@pytest.mark.parametrize("preset", sorted(p.name for p in (ROOT / "presets").iterdir() if not p.suffix))
def test_presets_are_read(tiny, preset):
    s = pretrain.arguments([f"@{ROOT / 'presets' / preset}", "--videos", "v", "--flow", "f", "--prototypes", "p",
                            "--out", "o", "--epochs", "3"])
    assert s.epochs == 3 and s.size == {"cpu": 32, "ucf101-r2plus1d18": 112}.get(preset, 128)
    assert s.arch == ("r2plus1d18" if preset in ("cpu", "ucf101-r2plus1d18") else "s3d")


def test_flags_of_a_file_with_a_byte_order_mark(tmp_path):
    """As some editors save it."""
    (tmp_path / "mine").write_text("--epochs 3  # few\n--size 64\n", encoding="utf-8-sig")
    s = pretrain.arguments([f"@{tmp_path / 'mine'}", "--videos", "v", "--flow", "f", "--prototypes", "p", "--out", "o"])
    assert (s.epochs, s.size) == (3, 64)


def test_the_plan_names_a_rate_that_was_given():
    s = settings(lr=0.5, batch_size=10)
    assert "--lr 0.5;" in rate_rule(s, 10) and "0.5 in" in rate_rule(s, 10)


def test_tensorboard_has_the_numbers_of_the_log(tiny, tmp_path, monkeypatch):
    """Or a message where it is not installed; a run that goes on hides what it does again."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "torch.utils.tensorboard", None)
        with pytest.raises(BadInput, match=r"--tensorboard needs the package .*pip install tensorboard"):
            run(tiny, tmp_path / "run", "--tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    real = pretrain.step_loss
    with monkeypatch.context() as patch:
        steps = iter(range(1, 10))
        patch.setattr(pretrain, "step_loss", lambda *args: real(*args) if next(steps) < 4 else sys.exit(1))
        with pytest.raises(SystemExit):
            run(tiny, tmp_path / "run", "--tensorboard")  # saved after 2 steps, written after 3
    assert run(tiny, tmp_path / "run", "--tensorboard") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    lines = log(tmp_path / "run")
    for name in ("loss", "lr", "rank", "samples_per_s"):
        assert [e.step for e in events.Scalars(name)] == [1, 2, 3, 4]
        written = [line[name] for line in lines if "loss" in line]
        assert [e.value for e in events.Scalars(name)] == pytest.approx(written)


# --- bad input -------------------------------------------------------------------------------------------------------
def test_changed_settings_are_refused_on_resume(tiny, whole, tmp_path):
    with pytest.raises(BadInput, match=r"trained with other settings \(lambda2 0.03 -> 0.01\)"):
        run(tiny, whole, "--lambda2", "0.01")
    wide = tmp_path / "wide.npz"
    save_arrays(wide, "prototypes", {}, prototypes=torch.randn(24, 8).numpy())
    with pytest.raises(BadInput, match=r"prototypes \[24, 16\], but --prototypes .* holds \[24, 8\]"):
        run(tiny, whole, "--prototypes", str(wide))


def test_settings_that_may_change_are_listed_when_they_do(tiny, whole, tmp_path, capsys):
    """Also the videos' number, which may not: the steps of an epoch hang on it."""
    assert run(tiny, whole, "--log-every", "2", "--timeout", "50") == 0
    said = capsys.readouterr().out
    assert "changed since the run began: " in said and "log_every 1 -> 2" in said and "timeout 600 -> 50.0" in said
    (tmp_path / "run").mkdir()
    state = load_checkpoint(whole)
    state["settings"]["train_videos"] = 21
    save_run(tmp_path / "run", state, 1)
    with pytest.raises(BadInput, match=r"other settings \(train_videos 21 -> 20\)"):
        run(tiny, tmp_path / "run")


@pytest.mark.parametrize(("more", "words"), [
    (["--batch-size", "21"], "more than the 20 videos"), (["--batch-size", "1"], "--batch-size 1: one video has no"),
    (["--lambda1", "0"], "--lambda1: 0 must be a number above 0"),
    (["--lr", "nan"], "--lr: nan must be a number above 0, and finite"), (["--lr", "-1"], "--lr: -1 must be"),
    (["--temperature", "inf"], "--temperature: inf must be"), (["--timeout", "nan"], "--timeout: nan"),
    (["--weight-decay", "nan"], "--weight-decay: nan must be"), (["--max-faults", "nan"], "--max-faults: nan"),
    (["--seed", "-1"], "--seed: -1 must be a whole number from 0 to"),
    (["--workers", "-1"], "--workers: -1 must be"),
    (["--momentum", "1"], "--momentum: 1 must be a number of at least 0 and below 1"),
    (["--method", "avg", "--heads", "2"], "no use for --heads 2"),
    (["--method", "sview", "--train-prototypes"], "would be shared by the two networks of --method sview; train one"),
    (["--compile", "--recompute"], "don't go together"),
    (["--prototypes", "absent.npz"], "absent.npz doesn't exist; make it with: python prototypes.py"),
    (["--flow", "absent"], "absent is no flow store"), (["--scale", "0.5", "1"], "must be 1 <= LOW <= HIGH"),
    (["--arch", "s3d", "--size", "32"], "clips of 4 frames and 32 px are too small for s3d.*raise --frames"),
    (["--device", "cuda"], "torch sees no GPU")])
def test_bad_arguments_get_a_sentence(tiny, tmp_path, more, words):
    if more[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(BadInput, match=words):
        run(tiny, tmp_path / "run", *more)


def test_videos_without_flow_are_counted(tiny, tmp_path, capsys):
    store = tmp_path / "flow"
    store.mkdir()
    (store / "header.json").write_text((tiny.flow / "header.json").read_text())
    with pytest.raises(BadInput, match=r"the flow of none of the 20 videos.*python flow\.py"):
        run(tiny, tmp_path / "run", "--flow", str(store))
    names = sorted(p.relative_to(tiny.flow) for p in tiny.flow.rglob("*.avi") if "g" in p.name)
    for name in names[:-3]:
        (store / name).parent.mkdir(exist_ok=True)
        (store / name).symlink_to(tiny.flow / name)
    assert run(tiny, tmp_path / "run", "--flow", str(store), "--epochs", "1", "--batch-size", "4") == 0
    lacking = {v.name for v in read_split("ucf101", tiny.videos, tiny.splits).videos} & {
        str(name.with_suffix("")) for name in names[-3:]}
    assert lacking and f"listed but absent, {len(lacking)} without flow" in capsys.readouterr().out


def damaged(tiny, tmp_path, count):
    """A copy of the set's films of which `count` training films are empty -> arguments."""
    videos = tmp_path / "videos"
    shutil.copytree(tiny.videos, videos)
    listed = (tiny.splits / "trainlist01.txt").read_text().split()[::2]
    for name in listed[:count]:
        (videos / name).write_bytes(b"")
    return ["--videos", str(videos)], [str(videos / name) for name in listed[:count]]


def test_a_bad_video_is_replaced_named_once_and_counted(tiny, tmp_path, capsys):
    more, (path,) = damaged(tiny, tmp_path, 1)
    assert run(tiny, tmp_path / "run", *more) == 0
    said = capsys.readouterr().err
    assert said.count(f"skipped: {path} is empty") == 1 and "1 videos could not be read and were replaced" in said
    assert [line["skipped"] for line in log(tmp_path / "run")[1:]][-1] == 1


def test_too_many_bad_videos_stop_the_run_and_nothing_is_lost(tiny, tmp_path):
    more, _ = damaged(tiny, tmp_path, 3)
    with pytest.raises(BadInput, match=r"[23] of 20 videos could not be read, more than --max-faults 0.01"):
        run(tiny, tmp_path / "run", *more)
    stopped = load_checkpoint(tmp_path / "run")["step"]
    assert stopped >= 1
    assert run(tiny, tmp_path / "run", *more, "--max-faults", "0.5") == 0
    steps = [line["step"] for line in log(tmp_path / "run") if "loss" in line]
    assert steps == [1, 2, 3, 4]


def test_videos_that_the_index_knows_to_be_bad_are_left_out(tiny, tmp_path, capsys):
    more, _ = damaged(tiny, tmp_path, 3)
    scan(more[1], tmp_path / "index.npz", workers=1)
    assert run(tiny, tmp_path / "run", *more, "--index", str(tmp_path / "index.npz"), "--batch-size", "8") == 0
    said = capsys.readouterr()
    assert "17 videos (0 listed but absent, 3 that do not decode, 0 without flow)" in said.out
    assert "skipped" not in said.err


def test_status_and_message_of_the_command(tmp_path):
    command = [sys.executable, str(ROOT / "pretrain.py"), "--videos", str(tmp_path), "--flow", str(tmp_path),
               "--prototypes", "p.npz", "--out", str(tmp_path / "o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "is no flow store" in done.stderr
