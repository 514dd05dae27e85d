"""Stage 3: pre-training (paper sections 3.2 and 3.4, Eqs. 6-10, 12, 13; Fig. 2).

In   videos of one data set, the flow store of flow.py, the prototypes of prototypes.py.
Out  RUN/log.jsonl (one JSON object a line; the first holds command, commit and settings) and RUN/checkpoint.pt.

    torchrun --nproc-per-node 8 pretrain.py --dataset ucf101 --videos UCF-101 --splits ucfTrainTestlist \\
        --flow flow/ucf101 --prototypes prototypes.npz --out runs/ucf101
    python pretrain.py --dataset folder --videos my_videos --flow flow/mine --prototypes prototypes.npz --out runs/mine

One step: each video's long and short crops of both views go through the two backbones and the head to unit features,
their products with the prototypes are the scores, the long crops' scores are assigned (guided by the other view), and
every crop predicts the assignments of the video's other long crops. The same command continues an interrupted run.

Watch `loss` against ln N (6.908 for 1000 prototypes): a loss that stays there has collapsed. Defaults are the paper's;
the README lists what the paper leaves open and what was chosen.
"""

import argparse
import hashlib
import math
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
import goca
import model
from support.batch_norm import synchronise_batch_norm
from support.checkpoints import last_checkpoint, lock, lock_timeout, resume, save_run
from support.cli import Help, command_line
from support.datasets import DATASETS, read_split
from support.distributed import (
    MaxOverRanks,
    check_same_on_all_ranks,
    cores_per_process,
    data_parallel,
    gather_rows,
    rank_and_world,
    run_on_all_ranks,
    run_on_first_rank,
    same_on_all_ranks,
    start_processes,
)
from support.errors import EXIT_LOST, BadInput
from support.files import load_arrays
from support.loader import Loader
from support.optim import LARS, AdamW, check_weights, learning_rate, rate_rule, scaled_rate, step_if_finite
from support.signals import IntervalTimer, StopSignals
from support.stores import FlowStore, RgbStore
from support.training_log import Log, commit
from support.watchdog import Watchdog, end_process_group, is_peer_failure


# ---------------------------------------------------------------------------------------------------------------------
# The step's mathematics
# ---------------------------------------------------------------------------------------------------------------------
def assign(batch_scores, s, guided):
    """log D of the whole batch: scores of the assigning crops [G, A, M, N] -> [G, A, M, N] (Eqs. 5-7)."""
    if guided:
        return goca.guided_assign(batch_scores, s.lambda1, s.lambda2, s.iters, prior_sign=s.prior_sign,
                                  check_finite=False)
    return goca.assign(batch_scores, s.lambda1, iters=s.iters, check_finite=False)


def cross_view_loss(scores, log_d, temperature):
    """ViCC's loss: each assignment is predicted by all crops of both views but the one that it comes from.

    scores [2, V, m, N], log_d [2, A, m, N] -> scalar, mean over samples and pairs.
    """
    with torch.autocast(scores.device.type, enabled=False):
        log_g = F.log_softmax(scores.float() / temperature, dim=-1)
        pairs = -torch.einsum("gamn,hvmn->gahv", log_d.exp(), log_g) / scores.shape[2]
    _, A, _, V = pairs.shape
    own = torch.eye(2, device=pairs.device)[:, None, :, None] * torch.eye(A, V, device=pairs.device)[:, None]
    return (pairs * (1 - own)).sum() / (2 * A * (2 * V - 1))


def schedule(step, per_epoch, s):
    """What a step's epoch says -> (whether the views guide each other, the view that ViCC leaves as it is)."""
    epoch = step // per_epoch
    frozen = model.VIEWS[1 - epoch // s.alternate % 2] if s.method == "vicc" else None  # RGB learns first
    return s.method == "goca" and epoch >= s.guide_start, frozen


def step_loss(net, clips, s, guided, frozen=None, rows=None):
    """Loss of one step on this process's videos (Eqs. 12, 13); its mean over processes is that over all samples.

    rows: the number of videos of each process (default: as many as here).
    -> scalar, scores of the assigning crops [G, 2, M, N], their features [G, 2, M, d], both of the whole batch.
    """
    core = net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net
    features, scores = net(clips, frozen, scored=True)  # [G, V, m, d], [G, V, m, N]
    batch_features = gather_rows(features[:, :2], rows)  # of all processes
    batch_scores = core.scores(batch_features).detach()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    m = features.shape[2]
    rows = rows or [m] * world
    first = sum(rows[:rank])
    if guided:
        loss = goca.guided_loss(scores, n_assign=2, lambda1=s.lambda1, lambda2=s.lambda2, temperature=s.temperature,
                                iters=s.iters, prior_sign=s.prior_sign, batch_scores=batch_scores, first_row=first,
                                check_finite=False)
    else:
        own = assign(batch_scores, s, guided)[:, :, first:first + m]
        loss = (cross_view_loss(scores, own, s.temperature) if s.method == "vicc" else
                goca.swapped_loss(scores, own, s.temperature, check_finite=False))
    return loss * (m * world / sum(rows)), batch_scores, batch_features


@torch.no_grad()
def describe(log_d, features):
    """What to watch besides the loss: log D [G, A, M, N], unit features [G, A, M, d] -> dict of numbers."""
    d = log_d.exp()
    top = log_d.argmax(-1)  # [G, A, M]
    spread = torch.linalg.svdvals(features.flatten(1, 2).float().nan_to_num()).square()  # [G, min(A M, d)]
    spread = spread / spread.sum(-1, keepdim=True)
    return {"entropy": -(d * log_d).sum(-1).mean().item(),  # of an assignment, in nats; ln N if it says nothing
            "prototypes_in_use": top.unique().numel(),
            # effective dimensions of the poorer view, exp of the entropy of the squared singular values
            "rank": torch.special.entr(spread).sum(-1).exp().min().item(),
            "crops_agree": (top[:, 0] == top[:, 1]).float().mean().item(),
            **({"views_agree": (top[0] == top[1]).float().mean().item()} if len(top) == 2 else {})}


def make_optimizer(net, s):
    """LARS (the paper), or AdamW, which small batches and short runs learn faster with."""
    if s.optimizer == "adamw":
        return AdamW(net.parameters(), s.lr, (s.momentum, 0.99), s.weight_decay)
    return LARS(net.parameters(), s.lr, s.momentum, s.weight_decay, s.trust)


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
def crops_in_words(s):
    return f"2 crops of {s.frames} and {s.short_crops} of {s.short_frames} frames, {s.size} px"


def out_of_memory(s, error):
    """The message for a lack of memory, or None if it is something else."""
    words = str(error).strip().splitlines() or [""]
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in words[0]:
        return (f"out of memory ({words[0]}) with --batch-size {s.batch_size}, each video in both views of "
                f"{crops_in_words(s)}. What helps: --recompute (a third more time, the same result), --batch-size "
                f"{max(1, s.batch_size // 2)} --accumulate {2 * s.accumulate} (each half is assigned by itself; a new "
                f"run), fewer --short-crops, --short-frames or --frames, a smaller --size")
    if "DataLoader worker" in words[0]:
        return f"a loader process ended ({words[0]}), most likely for want of memory: fewer --workers, and no --cache"
    return None


def train(s):
    """Pre-train with settings `s` (see `arguments`) -> exit status: 0 done, 128 + signal if asked to stop, LOST where
    other processes ended or hung."""
    with end_process_group():
        try:
            device, rank, world = start_processes(s)
            mine = rank == 0 and not s.plan
            with run_on_all_ranks(lambda: lock(Path(s.out), lock_timeout(s)) if mine else nullcontext()):
                return train_in(device, rank, world, s)
        except (RuntimeError, MemoryError) as e:
            if message := out_of_memory(s, e):
                raise BadInput(message) from e
            rank, world = rank_and_world()
            if world == 1 or not is_peer_failure(e):
                raise
            why = (str(e).strip().splitlines() or [""])[0].split(". This is typically")[0]  # gloo's advice
            print(f"error: process {rank} lost the others ({why}): one ended, or hung for longer than --timeout "
                  f"{s.timeout:g} s; look for its message. The same command continues from the last checkpoint",
                  file=sys.stderr, flush=True)
            sys.exit(EXIT_LOST)


def read_data(s):
    """The training set of settings `s` -> FlowStore, VideoSet, its videos with flow (and RGB), their TrainClips, and
    the prototypes [N, d]. Raises BadInput."""
    store, rgb = FlowStore(s.flow), RgbStore(s.rgb) if s.rgb else None
    found = read_split(s.dataset, s.videos, s.splits, s.split, "train", s.index)
    videos = [v for v in found.videos if v.name in store and (rgb is None or v.name in rgb)]
    if not videos:
        raise BadInput(f"{s.flow} holds the flow{f', or {s.rgb} the RGB,' if rgb else ''} of none of the "
                       f"{len(found.videos)} videos below {s.videos}; run: python flow.py --videos {s.videos} "
                       f"--out {s.flow}{f' --rgb {s.rgb}' if rgb else ''}")
    clips = data.TrainClips(videos, store, frames=s.frames, short_frames=s.short_frames, n_short=s.short_crops,
                            size=s.size, stride=s.stride, scale=tuple(s.scale), seed=s.seed, cache=s.cache,
                            time_limit=s.time_limit, rgb=rgb)
    _, arrays = load_arrays(s.prototypes, "prototypes", f"python prototypes.py --out {s.prototypes}")
    return store, found, videos, clips, torch.from_numpy(arrays["prototypes"])


def config_fingerprint(s, settings, videos, prototypes):
    """What all processes must have alike -> dict of plain values."""
    own = {"device", "workers", "cache", "videos", "splits", "flow", "rgb", "prototypes", "out", "index"}
    lists = {"list of videos": "\n".join(v.name for v in videos).encode(), "prototypes": prototypes.numpy().tobytes()}
    return {**{k: v for k, v in settings.items() if k not in own},
            **{k: hashlib.sha256(content).hexdigest()[:12] for k, content in lists.items()}}


def train_in(device, rank, world, s):
    """`train` in a process of a group."""
    out = Path(s.out)

    # --- data -------------------------------------------------------------------------------------------------------
    store, found, videos, clips, prototypes = run_on_all_ranks(lambda: read_data(s))

    # --- network ----------------------------------------------------------------------------------------------------
    core = model.two_view(vars(s), prototypes)
    core = core.to(device, memory_format=torch.channels_last_3d)
    for backbone in core.backbones.values():
        backbone.recompute = s.recompute
    if world > 1 and s.sync_batch_norm:
        core = synchronise_batch_norm(core)
    optimizer = make_optimizer(core, s)
    settings = {**vars(s), "global_batch": s.batch_size * world, "flow_header": store.header,
                "train_videos": len(videos)}
    say = print if rank == 0 else lambda *_: None
    check_same_on_all_ranks(config_fingerprint(s, settings, videos, prototypes))
    # one process reads: another may see the files of a moment ago, or none
    saved = run_on_first_rank(lambda: last_checkpoint(out, None if s.plan else s.keep))
    step, log_state = run_on_all_ranks(lambda: resume(saved, out, settings, core, optimizer, say))
    batches = data.EpochBatches(len(videos), s.batch_size, s.epochs, s.seed, rank, world, start=step,
                                keep_last=s.keep_last)
    per_epoch, total = batches.steps_per_epoch, batches.steps_per_epoch * s.epochs
    # one pass over the batches of all epochs: the workers live as long as the run, each two batches ahead
    loader = Loader(clips, batches.after, s.workers, pin_memory=device.type == "cuda")
    net = core
    if s.compile:
        for backbone in core.backbones.values():
            backbone.compile()
    if world > 1:
        net = data_parallel(core, device, find_unused_parameters=s.method == "vicc")

    # --- plan -------------------------------------------------------------------------------------------------------
    n, batch = len(core.prototypes), s.batch_size * world
    operator = f"compiled for {device.type}" if goca._compiled("auto", device) else "PyTorch reference"
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    rest = f"and one of {batches.rest}" if batches.rest else f"{len(videos) % batch} videos left out of each"
    say(f"{s.method} on {s.dataset} in {s.videos}: {len(videos)} videos ({len(found.absent)} listed but absent, "
        f"{len(found.faulty)} that do not decode, {len(found.videos) - len(videos)} without "
        f"flow{' or RGB' if s.rgb else ''}); both views of {crops_in_words(s)}; {s.workers} loader processes"
        f"{' for each process' if world > 1 else ''}\n"
        + "".join(f"{note}\n" for note in found.notes) +
        f"{s.arch}, width {s.width:g}, {sum(p.numel() for p in core.parameters()) / 1e6:.2f} M parameters, "
        f"{'bfloat16, assignment and loss float32' if device.type == 'cuda' else 'float32'} on {world} x {kind}; "
        f"assignment and loss: {operator}\n"
        f"{n} prototypes, ln N = {math.log(n):.3f}; batch {s.batch_size} x {world}"
        f"{f' x {s.accumulate} accumulated' if s.accumulate > 1 else ''}, {per_epoch} steps an epoch, {total} in all "
        f"({s.epochs} epochs, {rest})\n"
        f"{rate_rule(s, batch * s.accumulate)}" + (f"; continuing at step {step}" if step else ""))

    # --- loop -------------------------------------------------------------------------------------------------------
    log = Log(out, s, rank, world, step, total, per_epoch, math.log(n), log_state)
    if not s.plan and step < total:
        header = {"command": sys.argv, "commit": commit(), "torch": torch.__version__, "step": step,
                  "ln_n": math.log(n), "videos": len(videos), "settings": settings}
        run_on_all_ranks(lambda: log.start(header) if rank == 0 else None)
    net.train()
    due, asked, agree, timer, shapes = False, 0, MaxOverRanks(device, world), IntervalTimer(s.save_minutes), set()
    statistics = model.Statistics(core)
    last_statistics = statistics.read()  # of the last step that was done
    advice = "A process that hangs holds up all; the same command continues from the last checkpoint"
    with StopSignals() as stop, Watchdog(s.timeout if world > 1 else math.inf, rank, step, advice) as watchdog:
        for batch in log.timed(loader):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, per_epoch, s)
            guided, frozen = schedule(step, per_epoch, s)
            rows = batches.rows(step)
            if s.compile and (guided, frozen, *rows) not in shapes:
                shapes.add((guided, frozen, *rows))
                watchdog.compiling()
            clips = data.augment(batch, device)  # in float32
            together = min(s.accumulate, total - step // s.accumulate * s.accumulate)  # the last step may be of fewer
            step += 1
            whole = step % s.accumulate == 0 or step == total  # else more gradients are to come, which are shared once
            with nullcontext() if whole or world == 1 else net.no_sync():
                with model.precision(device):
                    loss, batch_scores, batch_features = step_loss(net, clips, s, guided, frozen, rows)
                (loss / together).backward()
            finite = None
            if whole:
                finite = step_if_finite(optimizer)  # in all processes alike: they have the same gradients
                optimizer.zero_grad(set_to_none=True)
                core.renormalise(finite)
                last_statistics = statistics.undo_unless(last_statistics, finite)
            log.add(loss, finite, batch["fault"], sum(rows))
            watchdog.beat(step)
            if s.plan:
                if log.planned(step, device.type):
                    return 0
                continue

            logging = step % s.log_every == 0 or step == total
            signalled, timed = agree(stop.signal, rank == 0 and timer())
            asked = asked or signalled
            due = due or timed or step % (s.save_every * per_epoch) == 0 or step == total
            if logging:
                log.check_finite(step)
                log.line(step, {"lr": learning_rate(step - 1, per_epoch, s), "guided": guided,
                                **describe(assign(batch_scores, s, guided), batch_features)})
            broken = log.too_many_faults(len(videos)) if whole and (world == 1 or logging) else None
            if whole and (due or asked or broken):
                log.check_finite(step)
                run_on_all_ranks(partial(check_weights, core, step, out))
                due, log_state = False, log.state()
                if rank == 0:
                    save_run(out, {"settings": settings, "step": step, "model": core.state_dict(),
                                        "optimizer": optimizer.state_dict(), "log": log_state}, s.keep)
            if world > 1 and whole and (asked or broken):
                dist.barrier()  # torchrun and Slurm end all once one is gone, and the first may still be saving
            if broken:
                raise same_on_all_ranks(BadInput(broken))
            if whole and asked:
                log.say(f"asked to stop (signal {asked}): saved step {step} of {total}; the same command continues")
                return 128 + asked
    log.end(step)
    return 0


def arguments(argv=None):
    p = argparse.ArgumentParser(description="GOCA pre-training on RGB and flow; defaults are the paper's. @FILE stands "
                                            "for the flags in FILE, such as @presets/ucf101-s3d; later ones win.",
                                formatter_class=Help, fromfile_prefix_chars="@")
    p.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    g = p.add_argument_group("input and output")
    g.add_argument("--dataset", choices=DATASETS, default="folder")
    g.add_argument("--videos", required=True, help="folder of videos")
    g.add_argument("--splits", help="folder of the data set's official lists")
    g.add_argument("--split", type=int, default=1, choices=(1, 2, 3), help="UCF101 and HMDB51")
    g.add_argument("--flow", required=True, help="flow store of flow.py")
    g.add_argument("--rgb", help="RGB store of flow.py --rgb, read in place of the videos")
    g.add_argument("--prototypes", required=True, help="file of prototypes.py")
    g.add_argument("--out", required=True, help="folder of the run; an interrupted run there is continued")
    g = p.add_argument_group("method")
    g.add_argument("--method", choices=model.METHODS, default="goca", help="others: baselines of Table 1")
    g.add_argument("--lambda1", type=float, default=0.02, help="weight of the entropy, Eq. 5 (Table 2)")
    g.add_argument("--lambda2", type=float, default=0.03, help="weight of the prior, Eq. 6 (small batches: README)")
    g.add_argument("--prior-sign", type=int, choices=(1, -1), default=1, help="-1: the released code's anti-prior")
    g.add_argument("--guide-start", type=int, default=0, help="epoch from which the views guide each other")
    g.add_argument("--alternate", type=int, default=50, help="vicc: epochs that one view learns, then the other")
    g.add_argument("--train-prototypes", action="store_true", help='learn them too, as SwAV (Table 3, "No")')
    g.add_argument("--iters", type=int, default=3, help="Sinkhorn rounds (released code)")
    g.add_argument("--temperature", type=float, default=0.1, help="of the predictions (released code)")
    g = p.add_argument_group("network and clips")
    g.add_argument("--arch", choices=model.ARCHITECTURES, default="s3d")
    g.add_argument("--width", type=float, default=1.0, help="channel multiplier; 1 is the published network")
    g.add_argument("--hidden", type=int, default=2048, help="hidden units of the projection head")
    g.add_argument("--heads", type=int, choices=(1, 2), default=1, help="projection heads; 1 is shared by the views")
    g.add_argument("--pool", choices=("avg", "1x2x2"), default="avg", help="1x2x2: the released R(2+1)D-18 feature")
    g.add_argument("--frames", type=int, default=32, help="of the 2 long crops")
    g.add_argument("--short-frames", type=int, default=16, help="of the short crops")
    g.add_argument("--short-crops", type=int, default=4, help="0: no multi-temporal-resolution")
    g.add_argument("--stride", type=int, default=1, help="frames between two frames of a clip")
    g.add_argument("--size", type=int, default=128, help="px; 112 for r2plus1d18")
    g.add_argument("--scale", type=float, nargs=2, metavar=("LOW", "HIGH"),
                   help="short side before cropping, over size (default 136/128 190/128; r2plus1d18 128/112 160/112)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--optimizer", choices=("lars", "adamw"), default="lars", help="adamw: for small runs")
    g.add_argument("--batch-size", type=int, default=10, help="videos a process (paper: 10 on each of 64 GPUs)")
    g.add_argument("--sync-batch-norm", action=argparse.BooleanOptionalAction, default=True,
                   help="statistics of the whole batch, not of a process's part")
    g.add_argument("--accumulate", type=int, default=1, help="batches whose gradients make one step")
    g.add_argument("--keep-last", action="store_true", help="train on what does not fill an epoch's last batch, too")
    g.add_argument("--epochs", type=int, default=500)
    g.add_argument("--warmup-epochs", type=int, default=10, help="at most half of all")
    g.add_argument("--lr", type=float, help="default: 4.8 sqrt(batch/640); adamw 0.001")
    g.add_argument("--lr-start", type=float, help="default: lr/16 (0.3 at 4.8)")
    g.add_argument("--lr-end", type=float, help="default: lr/1000 (0.0048 at 4.8)")
    g.add_argument("--momentum", type=float, default=0.9)
    g.add_argument("--weight-decay", type=float, default=1e-6)
    g.add_argument("--trust", type=float, default=0.001, help="LARS trust coefficient")
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=int, default=0)
    g.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    g.add_argument("--workers", type=int, help="loader processes (default: cores, at most 8)")
    g.add_argument("--compile", action="store_true", help="torch.compile of the backbones")
    g.add_argument("--recompute", action="store_true", help="less memory: activations again in the backward pass")
    g.add_argument("--plan", action="store_true", help="say what would be done, time a few steps, and leave")
    g.add_argument("--index", help="file of support.video_index: leave out what it found not to decode")
    g.add_argument("--time-limit", type=float, default=60, help="seconds for one video's clips")
    g.add_argument("--max-faults", type=float, default=0.01, help="share of unreadable videos at which the run stops")
    g.add_argument("--timeout", type=float, default=600, help="of several processes: seconds for a step")
    g.add_argument("--cache", action="store_true", help="keep decoded videos in memory, once a loader process")
    g.add_argument("--log-every", type=int, default=20, help="steps")
    g.add_argument("--tensorboard", action="store_true", help="the log's numbers in RUN/tensorboard, too")
    g.add_argument("--save-every", type=int, default=1, help="epochs")
    g.add_argument("--save-minutes", type=float, default=30, help="save that often within an epoch, too; 0: don't")
    g.add_argument("--keep", type=int, default=2, help="checkpoints, the newest among them")
    s = p.parse_args(argv)

    world = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("lambda1", "temperature", "iters", "width", "hidden", "frames", "short_frames", "stride", "size",
                 "batch_size", "epochs", "log_every", "save_every", "time_limit", "accumulate",
                 "alternate", "keep", "timeout", "lr", "trust"):
        if getattr(s, name) is not None and not 0 < getattr(s, name) < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(s, name)}: must be above 0, and finite")
    for name in ("lambda2", "guide_start", "short_crops", "warmup_epochs", "max_faults", "weight_decay", "seed",
                 "workers", "lr_start", "lr_end"):
        if getattr(s, name) is not None and not 0 <= getattr(s, name) < math.inf:
            raise BadInput(f"--{name.replace('_', '-')} {getattr(s, name)}: must not be negative, and finite")
    if not s.save_minutes >= 0:
        raise BadInput(f"--save-minutes {s.save_minutes}: must not be negative")
    if not 0 <= s.momentum < 1:
        raise BadInput(f"--momentum {s.momentum}: must be at least 0 and below 1")
    if s.method == "avg" and s.heads == 2:
        raise BadInput("--method avg has one feature a clip, so no use for --heads 2")
    if s.compile and s.recompute:
        raise BadInput("--compile and --recompute don't go together: torch can't compile what is computed again")
    if why := model.too_small(s.arch, min(s.frames, s.short_frames) if s.short_crops else s.frames, s.size):
        raise BadInput(f"{why}: raise --frames, --short-frames or --size, or take --arch r2plus1d18")
    if s.scale is None:
        s.scale = list(data.SCALES[s.arch])
    if not 1 <= s.scale[0] <= s.scale[1]:
        raise BadInput(f"--scale {s.scale[0]} {s.scale[1]}: must be 1 <= LOW <= HIGH")
    if s.lr is None:
        s.lr = 0.001 if s.optimizer == "adamw" else scaled_rate(s.batch_size * s.accumulate * world)
    s.lr_start = s.lr_start if s.lr_start is not None else s.lr / 16
    s.lr_end = s.lr_end if s.lr_end is not None else s.lr / 1000
    s.warmup_epochs = min(s.warmup_epochs, s.epochs // 2)
    if s.workers is None:
        s.workers = min(8, cores_per_process())
    return s


def main():
    try:
        s = arguments()
    except BadInput as e:
        raise same_on_all_ranks(e) from None
    return train(s)


if __name__ == "__main__":
    command_line(main)
