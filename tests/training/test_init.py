"""--init: the weights that a run begins with. --extend: more epochs than a run began with."""

import pytest
import torch
from helpers.small_runs import log_lines
from helpers.training import made, settings, train

import model
import pretrain
from support.checkpoints import changed_settings, load_checkpoint, save_checkpoint
from support.errors import BadInput
from support.files import load_arrays
from support.optim import learning_rate
from support.run import Run
from support.weights import export


@pytest.fixture(scope="module")
def before(tiny, tmp_path_factory):
    """A run of another seed, and its export -> folder, file, weights."""
    root = tmp_path_factory.mktemp("before")
    s = settings(arch="r2plus1d18", width=0.125, hidden=16, seed=5)
    prototypes = torch.from_numpy(load_arrays(tiny.prototypes, "prototypes", "")[1]["prototypes"])
    weights = model.two_view(vars(s), prototypes.flip(0)).state_dict()
    save_checkpoint(root / "checkpoint.pt", {"settings": vars(s), "step": 7, "model": weights})
    export(root, root / "export.pt")
    return root, root / "export.pt", weights


def kept(net, weights):
    """The parts of a network of which every tensor is that of `weights`."""
    own = net.state_dict()
    return {part for part in ("backbones", "heads", "prototypes") if all(
        weights[k].shape == t.shape and torch.equal(weights[k], t) for k, t in own.items() if k.startswith(part))}


@pytest.mark.parametrize(("of", "more", "parts", "words"), [
    (0, [], {"backbones", "heads"}, "backbones taken over; projection head taken over; prototypes of --prototypes, not "
                                    "its own"),
    (0, ["--train-prototypes"], {"backbones", "heads", "prototypes"}, "prototypes taken over"),
    (0, ["--hidden", "24"], {"backbones"}, "projection head new, for its own do not fit"),
    (1, [], {"backbones"}, "backbones taken over; projection head new; prototypes")])
def test_what_fits_is_taken_over_and_said(tiny, before, tmp_path, monkeypatch, capsys, of, more, parts, words):
    m = made(tiny, tmp_path, monkeypatch, "--init", str(before[of]), *more)
    assert m.start == 0 and kept(m.net, before[2]) == parts
    assert f"--init {before[of]}: " in (said := capsys.readouterr().out) and words in said


@pytest.mark.parametrize(("more", "words"), [
    (["--width", "0.25"], r"holds another network than --arch r2plus1d18 --width 0.25 \(first difference: backbones"),
    (["--init", "absent"], "absent doesn't exist")])
def test_what_can_t_be_begun_with_is_refused(tiny, before, tmp_path, monkeypatch, more, words):
    with pytest.raises(BadInput, match=words):
        made(tiny, tmp_path, monkeypatch, "--init", str(before[0]), *more)


def test_a_run_goes_on_with_more_epochs_only_when_asked(tiny, tmp_path, monkeypatch, capsys):
    """The rate is that of the longer run, but for the warm-up; flow leads as long as it did."""
    out, more = tmp_path / "run", ["--batch-size", "4", "--accumulate", "2", "--log-every", "1", "--lead", "flow"]
    assert train(tiny, out, *more, "--epochs", "2") == 0
    longer = [*more, "--epochs", "4", "--warmup-epochs", "2"]
    with pytest.raises(BadInput, match=r"epochs 2 -> 4, warmup_epochs 1 -> 2\).*, or --extend for more epochs"):
        train(tiny, out, *longer)
    with pytest.raises(BadInput, match=r"\(lead_epochs 1 -> 2\)"):
        train(tiny, out, *longer, "--extend", "--lead-epochs", "2")
    with pytest.raises(BadInput, match=r"--extend lengthens a run: .* was begun with --epochs 2, which is more than 1"):
        train(tiny, out, *more, "--epochs", "1", "--extend")
    updates, real = [], Run.update
    monkeypatch.setattr(Run, "update", lambda run, loss: (
        updates.append((run.step, run.share, run.is_update_step)), real(run, loss)))
    capsys.readouterr()
    assert train(tiny, out, *longer, "--extend") == 0
    s = pretrain.arguments([*tiny.common(), "--prototypes", "p", "--out", "o", *longer, "--arch", "r2plus1d18"])
    s.warmup_epochs = 1  # the run's own
    assert [line["lr"] for line in log_lines(out)][10:] == [
        pytest.approx(learning_rate(step, 5, s)) for step in range(10, 20)]
    said = capsys.readouterr().out
    assert "--extend: 2 -> 4 epochs. The learning rate's cosine is stretched to the new end: it was " in said
    assert f"in step 10 and goes on with {learning_rate(10, 5, s):.4g}" in said
    assert [u[0] for u in updates] == list(range(10, 20)) and {u[1] for u in updates} == {0.5}
    state = load_checkpoint(out)
    assert state["step"] == 20 and {state["settings"][k] for k in ("warmup_epochs", "lead_epochs")} == {1}


def test_settings_of_earlier_versions_mean_what_they_did():
    """Checkpoints that know no --lead, and --sync-batch-norm as true or false."""
    old = {"seed": 1, "sync_batch_norm": True}
    now = {"seed": 1, "sync_batch_norm": "own", "lead": "none", "lead_epochs": 0, "init": None, "unknown": 3}
    assert changed_settings(old, now) == {}
    assert changed_settings(old, {**now, "lead": "flow", "lead_epochs": 2}) == {
        "lead": ("none", "flow"), "lead_epochs": (0, 2)}
    assert changed_settings(old, {**now, "sync_batch_norm": "none"}) == {"sync_batch_norm": (True, "none")}
    assert changed_settings({**old, "sync_batch_norm": False}, {**now, "sync_batch_norm": "none"}) == {}
