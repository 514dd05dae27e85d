"""Each flag of pretrain.py reaches what it names: assignment, loss, clips, batches, network, optimizer, loop."""

import math
import os

import pytest
import torch
from helpers.small_runs import log_lines
from helpers.training import fake_clips, made, settings, train

import goca
import model
import pretrain
from support.batch_norm import GlobalBatchNorm, synchronisation, synchronise_batch_norm
from support.checkpoints import load_checkpoint, save_run
from support.errors import BadInput
from support.optim import LARS
from support.training_flags import parser


# --- the method ------------------------------------------------------------------------------------------------------
def assigned(scores, prior, lambda1, lambda2, iters):
    """Eqs. 8 and 10 in the linear domain and float64: scores [M, N], D' or None -> rows that sum to 1."""
    k = (scores.double() / lambda1).exp()
    if prior is not None:
        k = (scores.double() / (lambda1 + abs(lambda2))).exp() * prior ** (lambda2 / (lambda1 + abs(lambda2)))
    for _ in range(iters):
        k = k / k.sum(0, keepdim=True) / k.shape[1]
        k = k / k.sum(1, keepdim=True) / k.shape[0]
    return k * len(k)


def by_hand(scores, method, *, lambda1, lambda2, temperature, iters, prior_sign):
    """The loss of scores [G, V, M, N], the first two crops of which are assigned."""
    d = [[assigned(scores[g, a], None, lambda1, 0, iters) for a in (0, 1)] for g in range(len(scores))]
    if method == "goca":
        d = [[assigned(scores[g, a], d[1 - g][a], lambda1, prior_sign * lambda2, iters) for a in (0, 1)]
             for g in (0, 1)]
    log_g = (scores.double() / temperature).log_softmax(-1)
    views = range(len(scores))
    terms = [-(d[g][a] * log_g[h, v]).sum(-1).mean() for g in views for a in (0, 1) for h in views
             for v in range(scores.shape[1]) if ((g, a) != (h, v) if method == "vicc" else g == h and a != v)]
    return torch.stack(terms).mean()


NUMBERS = {"lambda1": 0.2, "lambda2": 0.3, "temperature": 0.2, "iters": 2}  # unlike the defaults, all of them


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("impl", ["reference", "compiled"])
def test_the_guided_loss_is_that_of_a_hand_built_assignment(impl, sign):
    if impl == "compiled" and goca._goca is None:
        pytest.skip("the extension isn't built")
    scores = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0)).tanh()
    loss = goca.guided_loss(scores, **NUMBERS, prior_sign=sign, impl=impl)
    torch.testing.assert_close(loss.double(), by_hand(scores, "goca", **NUMBERS, prior_sign=sign), rtol=1e-5, atol=1e-6)
    batch = torch.cat([scores, torch.randn(2, 3, 2, 7).tanh()], dim=2)  # of two processes, of 3 and of 4 rows
    parts = [goca.guided_loss(batch[:, :, rows].contiguous(), **NUMBERS, prior_sign=sign, impl=impl,
                              batch_scores=batch[:, :2].contiguous(), first_row=rows.start)
             for rows in (slice(0, 3), slice(3, 7))]
    mean = (3 * parts[0] + 4 * parts[1]) / 7
    torch.testing.assert_close(mean.double(), by_hand(batch, "goca", **NUMBERS, prior_sign=sign), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("method", "sign"), [("goca", 1), ("goca", -1), ("sep", 1), ("vicc", 1)])
@pytest.mark.parametrize("impl", ["reference", "compiled"])
@pytest.mark.filterwarnings("ignore:.*the PyTorch reference is used")
def test_a_step_s_loss_takes_every_number_from_its_flag(method, sign, impl, monkeypatch):
    if impl == "reference":
        monkeypatch.setattr(goca, "_goca", None)
        monkeypatch.setattr(goca, "_MISSING", "not built", raising=False)
    elif goca._goca is None:
        pytest.skip("the extension isn't built")
    s = settings(method=method, arch="r2plus1d18", width=0.125, hidden=16, prior_sign=sign, **NUMBERS)
    net, clips = model.two_view(vars(s), torch.randn(12, 6)), fake_clips(4)
    loss, batch_scores, *_ = pretrain.step_loss(net, clips, s, (method == "goca",) * 2)
    scores = net.scores(net(clips)).detach()  # training mode: batch statistics, so the same features again
    expected = by_hand(scores, method, **NUMBERS, prior_sign=sign)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-4, atol=1e-5)
    logged = pretrain.assign(batch_scores, s, (method == "goca",) * 2)  # what the log describes
    own = assigned(scores[0, 1], None, 0.2, 0, 2)
    if method == "goca":
        own = assigned(scores[0, 1], assigned(scores[1, 1], None, 0.2, 0, 2), 0.2, sign * 0.3, 2)
    torch.testing.assert_close(logged[0, 1].exp().double(), own, rtol=1e-3, atol=1e-4)


# --- from the arguments to the clips, the batches, the network and the optimizer -------------------------------------


@pytest.mark.parametrize(("flag", "value", "where"), [
    ("--seed", 7, lambda m: m.clips.seed), ("--stride", 2, lambda m: m.clips.stride),
    ("--scale", (1.5, 2.5), lambda m: m.clips.scale), ("--time-limit", 9.0, lambda m: m.clips.time_limit),
    ("--size", 24, lambda m: m.clips.size), ("--frames", 6, lambda m: m.clips.lengths["long"][1]),
    ("--short-crops", 3, lambda m: len(m.clips.lengths["short"])), ("--cache", None, lambda m: m.clips.cache == {}),
    ("--batch-size", 4, lambda m: m.batches.batch_size), ("--epochs", 9, lambda m: m.batches.epochs),
    ("--seed", 3, lambda m: m.batches.seed), ("--keep-last", None, lambda m: m.batches.rest == 4),
    ("--recompute", None, lambda m: all(b.recompute for b in m.net.backbones.values())),
    ("--width", 0.25, lambda m: m.net.backbones["rgb"].feature_dim / 512),
    ("--heads", 2, lambda m: len(m.net.heads)), ("--hidden", 24, lambda m: m.net.heads[0][0].out_features),
    ("--pool", "1x2x2", lambda m: f"1x{m.net.backbones['flow'].pool}x2"),
    ("--trust", 0.5, lambda m: m.optimizer.defaults["trust"]), ("--lr", 0.25, lambda m: m.optimizer.defaults["lr"]),
    ("--momentum", 0.7, lambda m: m.optimizer.defaults["momentum"]),
    ("--weight-decay", 0.125, lambda m: m.optimizer.defaults["weight_decay"])])
def test_flags_reach_what_they_name(tiny, tmp_path, monkeypatch, flag, value, where):
    values = [] if value is None else [str(v) for v in (value if isinstance(value, tuple) else [value])]
    assert where(made(tiny, tmp_path, monkeypatch, flag, *values)) == (True if value is None else value)


def test_adamw_gets_its_rate_momentum_and_decay(tiny, tmp_path, monkeypatch):
    more = ["--optimizer", "adamw", "--momentum", "0.8", "--weight-decay", "0.25"]
    optimizer = made(tiny, tmp_path, monkeypatch, *more).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {k: optimizer.defaults[k] for k in ("lr", "betas", "weight_decay")} == {
        "lr": 0.001, "betas": (0.8, 0.99), "weight_decay": 0.25}
    assert type(made(tiny, tmp_path, monkeypatch).optimizer) is LARS


def test_the_scale_of_the_crops_is_that_of_the_network(tiny, tmp_path, monkeypatch):
    assert made(tiny, tmp_path, monkeypatch).clips.scale == (128 / 112, 160 / 112)  # R(2+1)D-18
    more = ["--arch", "s3d", "--frames", "8", "--size", "32"]
    assert made(tiny, tmp_path, monkeypatch, *more).clips.scale == (136 / 128, 190 / 128)


@pytest.mark.parametrize(("more", "world", "synchronised"), [([], 2, True), (["--no-sync-batch-norm"], 2, False),
                                                             ([], 1, False)])
def test_batch_norm_is_that_of_all_processes_unless_told_otherwise(tiny, tmp_path, monkeypatch, more, world,
                                                                   synchronised):
    net = made(tiny, tmp_path, monkeypatch, *more, world=world).net
    norms = [m for m in net.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 20 and {isinstance(m, GlobalBatchNorm) for m in norms} == {synchronised}


@pytest.mark.parametrize(("flags", "kind"), [
    ([], "auto"), (["--sync-batch-norm"], "auto"), (["--no-sync-batch-norm"], "none"),
    (["--sync-batch-norm", "own"], "own"), (["--sync-batch-norm", "torch"], "torch")])
def test_old_and_new_ways_to_ask_for_synchronised_batch_norm(flags, kind):
    s = pretrain.arguments([*flags, "--videos", "v", "--flow", "f", "--prototypes", "p", "--out", "o"])
    assert s.sync_batch_norm == kind


def test_which_synchronised_batch_norm_is_taken():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [synchronisation(flag, gpu) for flag in ("auto", "torch", "own")] == ["torch", "torch", "own"]
    assert [synchronisation(flag, cpu) for flag in ("auto", "own")] == ["own", "own"]
    with pytest.raises(BadInput, match=r"--sync-batch-norm torch: torch\.nn\.SyncBatchNorm works on GPUs alone"):
        synchronisation("torch", cpu)
    net = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 1), torch.nn.BatchNorm3d(3))
    weight, buffers = net[1].weight, dict(net[1].named_buffers())
    net = synchronise_batch_norm(net, "torch")
    assert isinstance(net[1], torch.nn.SyncBatchNorm) and net[1].weight is weight
    assert all(dict(net[1].named_buffers())[name] is b for name, b in buffers.items())


# --- what is said of flags -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("flags", "words"), [
    (["--method", "sep", "--lambda2", "0.01"], "--lambda2 0.01 has no effect with --method sep"),
    (["--method", "vicc", "--lead", "flow", "--lead-epochs", "3"], "--lead flow has no effect with --method vicc"),
    (["--method", "avg", "--guide-start", "3"], "--guide-start 3 has no effect with --method avg"),
    (["--method", "sview", "--prior-sign", "-1"], "--prior-sign -1 has no effect with --method sview"),
    (["--alternate", "3"], "--alternate 3 has no effect with --method goca"),
    (["--optimizer", "adamw", "--trust", "0.1"], "--trust 0.1 has no effect with --optimizer adamw"),
    (["--short-crops", "0", "--short-frames", "32"], "--short-frames 32 has no effect with --short-crops 0"),
    (["--frames", "8"], "--short-frames 16 is more than --frames 8: short crops are the longer ones"),
    (["--guide-start", "500"], "--guide-start 500 is not reached in --epochs 500"),
    (["--epochs", "8"], "--warmup-epochs 10 is cut to 4, half of --epochs 8"),
    (["--method", "vicc", "--alternate", "3"], None), (["--method", "goca", "--lambda2", "0.01"], None)])
def test_flags_without_effect_are_said(capsys, monkeypatch, flags, words):
    argv = [*flags, "--videos", "v", "--flow", "f", "--prototypes", "p", "--out", "o"]
    s = pretrain.arguments(argv)
    said = capsys.readouterr().out
    assert f"note: {words}" in said if words else said == ""
    assert s.warmup_epochs == min(10, s.epochs // 2)
    monkeypatch.setenv("RANK", "1")
    pretrain.arguments(argv)
    assert capsys.readouterr().out == ""


def test_a_view_leads_for_three_quarters_of_the_epochs_where_nothing_else_is_said():
    required = ["--videos", "v", "--flow", "f", "--prototypes", "p", "--out", "o"]
    for flags, epochs in ((["--lead", "flow"], 375), (["--lead", "flow", "--epochs", "24"], 18), ([], 0),
                          (["--lead", "rgb", "--lead-epochs", "3"], 3), (["--lead", "rgb", "--lead-epochs", "0"], 0)):
        assert pretrain.arguments([*flags, *required]).lead_epochs == epochs
    with pytest.raises(BadInput, match="--lead-epochs 3: which view leads is missing"):
        pretrain.arguments(["--lead-epochs", "3", *required])


def test_help_shows_what_a_reader_of_the_paper_sets_and_help_all_the_rest(capsys):
    flags = {}
    for which in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as e:
            pretrain.arguments([which])
        assert e.value.code == 0
        text = capsys.readouterr().out
        flags[which] = {line.split()[0] for line in text.splitlines() if line.startswith("  --")}
        assert "SUPPRESS" not in text
    assert 20 <= len(flags["--help"]) <= 28 and {"--lambda1", "--epochs", "--plan"} <= flags["--help"]
    assert flags["--help"] < flags["--help-all"]
    every = {a.option_strings[-1] for a in parser(True)._actions} - {"--help", "--no-sync-batch-norm"}
    assert flags["--help-all"] == every


def test_a_split_trains_on_the_videos_of_its_own_list_alone(tiny, tmp_path, monkeypatch):
    """What list 2 leaves out is its test set."""
    listed = (tiny.splits / "trainlist01.txt").read_text().splitlines()
    (tmp_path / "classInd.txt").write_text((tiny.splits / "classInd.txt").read_text())
    parts = {"01": listed[:9], "02": listed[9:]}
    for split, lines in parts.items():
        (tmp_path / f"trainlist{split}.txt").write_text("\n".join(lines))
    for split, lines in parts.items():
        clips = made(tiny, tmp_path, monkeypatch, "--splits", str(tmp_path), "--split", split[1]).clips
        assert [v.name for v in clips.videos] == [line.split()[0].removesuffix(".avi") for line in lines]


@pytest.mark.parametrize(("cores", "local", "workers"), [(64, None, 8), (5, None, 5), (12, "4", 3), (2, "8", 1)])
def test_loader_processes_share_the_cores(monkeypatch, cores, local, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    if local:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    assert settings().workers == workers


# --- the loop --------------------------------------------------------------------------------------------------------
def test_the_optimizer_s_rate_is_that_of_its_step_and_of_the_log(tiny, tmp_path, monkeypatch):
    """2 steps an epoch: 4 of a warm-up from a sixteenth, 4 of a cosine to a thousandth."""
    rates, real = [], LARS.step
    monkeypatch.setattr(LARS, "step", lambda self: (
        rates.append({group["lr"] for group in self.param_groups}), real(self)))
    more = ["--epochs", "4", "--warmup-epochs", "2", "--lr", "1.6", "--log-every", "1"]
    assert train(tiny, tmp_path / "run", *more) == 0
    expected = [0.1 + 1.5 * t / 4 for t in range(4)]
    expected += [0.0016 + (1.6 - 0.0016) * (1 + math.cos(math.pi * t / 3)) / 2 for t in range(4)]
    assert [len(r) for r in rates] == [1] * 8
    assert [r.pop() for r in rates] == pytest.approx(expected)
    assert [line["lr"] for line in log_lines(tmp_path / "run")] == pytest.approx(expected)


@pytest.mark.parametrize(("batch", "together", "videos"), [(5, [2, 2], [5] * 4), (4, [2, 2, 1], [4] * 5),
                                                           (7, [2, 1], [7, 7, 6]), (12, [2], [12, 8])])
def test_accumulated_gradients_are_the_mean_over_their_videos(tiny, tmp_path, monkeypatch, batch, together, videos):
    """4 batches, two to a step; of 5 batches the last makes a step by itself; with a smaller last one."""
    batches, steps, real, update = [], [], pretrain.step_loss, LARS.step

    def step_loss(net, *args):
        loss, *more = real(net, *args)
        batches.append(torch.autograd.grad(loss, list(net.parameters()), retain_graph=True))
        return loss, *more

    def step(self):
        grads = {p: p.grad.clone() for group in self.param_groups for p in group["params"]}
        steps.append((len(batches), grads))
        update(self)

    monkeypatch.setattr(pretrain, "step_loss", step_loss)
    monkeypatch.setattr(LARS, "step", step)
    params = []
    make = pretrain.make_optimizer
    monkeypatch.setattr(pretrain, "make_optimizer", lambda net, s: (params.extend(net.parameters()), make(net, s))[1])
    more = ["--batch-size", str(batch), "--accumulate", "2", "--keep-last", "--epochs", "1"]
    assert train(tiny, tmp_path / "run", *more) == 0
    assert [at for at, _ in steps] == torch.tensor(together).cumsum(0).tolist()
    assert load_checkpoint(tmp_path / "run")["step"] == sum(together)
    for (end, grads), k in zip(steps, together, strict=True):
        for i, p in enumerate(params):
            mean = sum(batches[b][i] * videos[b] for b in range(end - k, end)) / sum(videos[end - k:end])
            torch.testing.assert_close(grads[p], mean, rtol=1e-4, atol=1e-6 + 1e-3 * mean.abs().max().item())


def test_checkpoints_come_every_so_many_epochs_and_at_the_end(tiny, tmp_path, monkeypatch):
    saved, real = [], save_run
    monkeypatch.setattr(pretrain, "save_run", lambda out, state, keep: (
        saved.append((state["step"], keep)), real(out, state, keep)))
    assert train(tiny, tmp_path / "run", "--save-every", "2", "--keep", "3", "--epochs", "5") == 0
    assert saved == [(4, 3), (8, 3), (10, 3)]  # 2 steps an epoch
