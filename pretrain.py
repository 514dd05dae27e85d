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
import math
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import data
import goca
import model
from training import (
    LARS,
    Log,
    Stop,
    commit,
    drop_if_not_finite,
    gather_rows,
    learning_rate,
    start_processes,
    synchronise_batch_norm,
)

# settings that may change on resume
FREE = {"device", "workers", "cache", "log_every", "save_every", "videos", "splits", "flow", "rgb", "prototypes", "out",
        "index", "time_limit", "max_faults", "keep", "plan", "compile", "recompute"}


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
    views, crops = torch.meshgrid(torch.arange(2), torch.arange(log_d.shape[1]), indexing="ij")
    own = torch.zeros(pairs.shape, dtype=torch.bool, device=pairs.device)
    own[views, crops, views, crops] = True
    return pairs.masked_fill(own, 0).sum() / (~own).sum()


def phase(step, per_epoch, s):
    """What a step's epoch says -> (whether the views guide each other, the view that ViCC leaves as it is)."""
    epoch = step // per_epoch
    frozen = model.VIEWS[1 - epoch // s.alternate % 2] if s.method == "vicc" else None  # RGB learns first
    return s.method == "goca" and epoch >= s.guide_start, frozen


def step_loss(net, clips, s, guided, frozen=None):
    """Loss of one step on this process's videos (Eqs. 12, 13).

    -> scalar, scores of the assigning crops [G, 2, M, N], their features [G, 2, M, d], both of the whole batch.
    """
    core = net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net
    features = net(clips, frozen)  # [G, V, m, d]
    scores = core.scores(features)  # [G, V, m, N]
    batch_features = gather_rows(features[:, :2])  # of all processes
    batch_scores = core.scores(batch_features).detach()
    m, first = features.shape[2], features.shape[2] * (dist.get_rank() if dist.is_initialized() else 0)
    if guided:
        loss = goca.guided_loss(scores, n_assign=2, lambda1=s.lambda1, lambda2=s.lambda2, temperature=s.temperature,
                                iters=s.iters, prior_sign=s.prior_sign, batch_scores=batch_scores, first_row=first,
                                check_finite=False)
    else:
        own = assign(batch_scores, s, guided)[:, :, first:first + m]
        loss = (cross_view_loss(scores, own, s.temperature) if s.method == "vicc" else
                goca.swapped_loss(scores, own, s.temperature, check_finite=False))
    return loss, batch_scores, batch_features


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
        return torch.optim.AdamW(net.parameters(), s.lr, betas=(s.momentum, 0.99), weight_decay=s.weight_decay)
    return LARS(net.parameters(), s.lr, s.momentum, s.weight_decay, s.trust)


# ---------------------------------------------------------------------------------------------------------------------
# Resume
# ---------------------------------------------------------------------------------------------------------------------
def save(out, state, keep):
    """Write RUN/checkpoint.pt; the `keep` - 1 before it are checkpoint.1.pt (the newest), checkpoint.2.pt, ..."""
    before = [out / "checkpoint.pt", *(out / f"checkpoint.{k}.pt" for k in range(1, keep))]
    for older, newer in reversed(list(zip(before[1:], before, strict=False))):
        if newer.exists():
            older.unlink(missing_ok=True)
            os.link(newer, older)  # checkpoint.pt stands until the new one replaces it
    data.save_checkpoint(before[0], state)


def last_good(out):
    """The newest checkpoint of a run that can be read, or None. A damaged one is named and the one before is taken.

    Raises BadInput if all that are there are damaged.
    """
    files = [out / "checkpoint.pt", *sorted(out.glob("checkpoint.*.pt"), key=lambda p: int(p.suffixes[0][1:]))]
    files = [f for f in files if f.exists()]
    for file in files:
        try:
            return data.load_checkpoint(file)
        except data.BadInput as e:
            if file == files[-1]:
                raise
            print(f"warning: {e}; taking the checkpoint before it", file=sys.stderr)
    return None


def resume(out, settings, net, optimizer, say):
    """Continue from the run's last good checkpoint -> the next step; says which settings changed.

    Raises BadInput where they do not allow it.
    """
    state = last_good(out)
    if state is None:
        return 0
    old = state["settings"]
    changed = {k: (old.get(k), v) for k, v in settings.items() if old.get(k) != v}
    broken = {k: v for k, v in changed.items() if k not in FREE}
    if broken:
        what = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in broken.items())
        raise data.BadInput(f"{out} was trained with other settings ({what}); give another --out, or these as before")
    if state["model"]["prototypes"].shape != net.prototypes.shape:
        raise data.BadInput(f"{out} was trained with prototypes {list(state['model']['prototypes'].shape)}, but "
                            f"--prototypes {settings['prototypes']} holds {list(net.prototypes.shape)}")
    if changed:
        say(f"changed since the run began: {', '.join(f'{k} {a} -> {b}' for k, (a, b) in changed.items())}")
    net.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------
def train(s):
    """Pre-train with settings `s` (see `arguments`) -> exit status: 0 done, 128 + signal if asked to stop."""
    device, rank, world = start_processes(s)
    out = Path(s.out)

    # --- data -------------------------------------------------------------------------------------------------------
    store, rgb = data.FlowStore(s.flow), data.RgbStore(s.rgb) if s.rgb else None
    found = data.read_split(s.dataset, s.videos, s.splits, s.split, "train", s.index)
    videos = [v for v in found.videos if v.name in store and (rgb is None or v.name in rgb)]
    if not videos:
        raise data.BadInput(f"{s.flow} holds the flow{f', or {s.rgb} the RGB,' if rgb else ''} of none of the "
                            f"{len(found.videos)} videos below {s.videos}; run: python flow.py --videos {s.videos} "
                            f"--out {s.flow}{f' --rgb {s.rgb}' if rgb else ''}")
    clips = data.TrainClips(videos, store, frames=s.frames, short_frames=s.short_frames, n_short=s.short_crops,
                            size=s.size, stride=s.stride, scale=tuple(s.scale), seed=s.seed, cache=s.cache,
                            time_limit=s.time_limit, rgb=rgb)

    # --- network ----------------------------------------------------------------------------------------------------
    _, arrays = data.load_arrays(s.prototypes, "prototypes", f"python prototypes.py --out {s.prototypes}")
    core = model.two_view(vars(s), torch.from_numpy(arrays["prototypes"]))
    core = core.to(device, memory_format=torch.channels_last_3d)
    for backbone in core.backbones.values():
        backbone.recompute = s.recompute
    if world > 1 and s.sync_batch_norm:
        core = synchronise_batch_norm(core, device)
    optimizer = make_optimizer(core, s)
    settings = {**vars(s), "global_batch": s.batch_size * world, "flow_header": store.header}
    say = print if rank == 0 else lambda *_: None
    step = resume(out, settings, core, optimizer, say)
    batches = data.Batches(len(videos), s.batch_size, s.epochs, s.seed, rank, world, start=step)
    per_epoch, total = batches.steps_per_epoch, batches.steps_per_epoch * s.epochs
    # one pass over the batches of all epochs: the workers live as long as the run, each two batches ahead
    loader = DataLoader(clips, batch_sampler=batches, num_workers=s.workers, pin_memory=device.type == "cuda",
                        worker_init_fn=data.start_worker)
    net = core
    if s.compile:
        for backbone in core.backbones.values():
            backbone.compile()
    if world > 1:
        net = nn.parallel.DistributedDataParallel(core, device_ids=[device] if device.type == "cuda" else None,
                                                  broadcast_buffers=False, find_unused_parameters=s.method == "vicc")

    # --- plan -------------------------------------------------------------------------------------------------------
    n = len(core.prototypes)
    operator = "compiled" if goca._compiled("auto", device) else "PyTorch reference"
    say(f"{s.method}: {len(videos)} videos ({len(found.absent)} listed but absent, {len(found.faulty)} that do not "
        f"decode, {len(found.videos) - len(videos)} without flow{' or RGB' if rgb else ''}); both views of "
        f"2 crops of {s.frames} and {s.short_crops} of {s.short_frames} frames, {s.size} px\n"
        f"{s.arch}, width {s.width:g}, {sum(p.numel() for p in core.parameters()) / 1e6:.2f} M parameters, "
        f"{'bfloat16, assignment and loss float32' if device.type == 'cuda' else 'float32'} on {world} x {device}; "
        f"assignment and loss: {operator}\n"
        f"{n} prototypes, ln N = {math.log(n):.3f}; batch {s.batch_size} x {world}"
        f"{f' x {s.accumulate} accumulated' if s.accumulate > 1 else ''}, {per_epoch} steps an epoch, {total} in all\n"
        f"learning rate ({s.optimizer}) {s.lr_start:.4g} -> {s.lr:.4g} -> {s.lr_end:.4g}"
        + (f"; continuing at step {step}" if step else ""))

    # --- loop -------------------------------------------------------------------------------------------------------
    log = Log(out, s, rank, world, step, total, per_epoch, math.log(n))
    if not s.plan:
        log.start({"command": sys.argv, "commit": commit(), "torch": torch.__version__, "step": step,
                   "ln_n": math.log(n), "videos": len(videos), "settings": settings})
    net.train()
    due = False  # a checkpoint
    with Stop() as stop:
        for batch in log.timed(loader):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, per_epoch, s)
            guided, frozen = phase(step, per_epoch, s)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss, batch_scores, batch_features = step_loss(net, data.augment(batch, device), s, guided, frozen)
            (loss / s.accumulate).backward()
            step += 1
            whole = step % s.accumulate == 0 or step == total  # else more gradients are to come
            finite = loss.detach().isfinite()
            if whole:
                finite = drop_if_not_finite(core.parameters())
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                core.renormalise()
            log.add(loss, finite, batch["fault"])
            if s.plan:
                if log.planned(step):
                    return 0
                continue

            logging = step % s.log_every == 0 or step == total
            due = due or step % (s.save_every * per_epoch) == 0 or step == total
            asked = stop.asked(device, world) if whole and (world == 1 or logging) else 0
            if logging:
                log.check_finite(step)
                log.line(step, {"lr": learning_rate(step - 1, per_epoch, s), "guided": guided,
                                **describe(assign(batch_scores, s, guided), batch_features)})
            broken = log.too_many_faults(len(videos)) if whole and (world == 1 or logging) else None
            if whole and (due or asked or broken):
                log.check_finite(step)
                due = False
                if rank == 0:
                    save(out, {"settings": settings, "step": step, "model": core.state_dict(),
                               "optimizer": optimizer.state_dict()}, s.keep)
            if broken:
                raise data.BadInput(broken)
            if asked:
                log.say(f"asked to stop (signal {asked}): saved step {step} of {total}; the same command continues")
                return 128 + asked
    log.end(step)
    if world > 1:
        dist.destroy_process_group()
    return 0


def arguments(argv=None):
    p = argparse.ArgumentParser(description="GOCA pre-training on RGB and flow; defaults are the paper's. @FILE stands "
                                "for the flags in FILE, such as @presets/ucf101-s3d; later ones win.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter, fromfile_prefix_chars="@")
    p.convert_arg_line_to_args = lambda line: line.split("#")[0].split()
    g = p.add_argument_group("input and output")
    g.add_argument("--dataset", choices=data.DATASETS, default="folder")
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
    g.add_argument("--lambda2", type=float, default=0.03, help="weight of the prior, Eq. 6; small runs: below lambda1")
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
    g.add_argument("--epochs", type=int, default=500)
    g.add_argument("--warmup-epochs", type=int, default=10)
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
    g.add_argument("--index", help="file of videos.py: leave out what it found not to decode")
    g.add_argument("--time-limit", type=float, default=60, help="seconds for one video's clips")
    g.add_argument("--max-faults", type=float, default=0.01, help="share of unreadable videos at which the run stops")
    g.add_argument("--cache", action="store_true", help="keep decoded videos in memory, once a loader process")
    g.add_argument("--log-every", type=int, default=20, help="steps")
    g.add_argument("--save-every", type=int, default=1, help="epochs")
    g.add_argument("--keep", type=int, default=2, help="checkpoints, the newest among them")
    s = p.parse_args(argv)

    world = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("lambda1", "temperature", "iters", "width", "hidden", "frames", "short_frames", "stride", "size",
                 "batch_size", "epochs", "log_every", "save_every", "time_limit", "accumulate",
                 "alternate", "keep"):
        if getattr(s, name) <= 0:
            raise data.BadInput(f"--{name.replace('_', '-')} {getattr(s, name)}: must be above 0")
    for name in ("lambda2", "guide_start", "short_crops", "warmup_epochs", "max_faults"):
        if getattr(s, name) < 0:
            raise data.BadInput(f"--{name.replace('_', '-')} {getattr(s, name)}: must not be negative")
    if s.scale is None:
        s.scale = [136 / 128, 190 / 128] if s.arch == "s3d" else [128 / 112, 160 / 112]
    if not 1 <= s.scale[0] <= s.scale[1]:
        raise data.BadInput(f"--scale {s.scale[0]} {s.scale[1]}: must be 1 <= LOW <= HIGH")
    if s.lr is None:
        s.lr = 0.001 if s.optimizer == "adamw" else 4.8 * math.sqrt(s.batch_size * s.accumulate * world / 640)
    s.lr_start = s.lr_start if s.lr_start is not None else s.lr / 16
    s.lr_end = s.lr_end if s.lr_end is not None else s.lr / 1000
    s.warmup_epochs = min(s.warmup_epochs, s.epochs // 2)
    if s.workers is None:
        s.workers = min(8, max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    return s


if __name__ == "__main__":
    data.command_line(lambda: train(arguments()))
