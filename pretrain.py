"""Stage 3: pre-training (paper sections 3.2 and 3.4, Eqs. 6-10, 12, 13; Fig. 2).

In   videos of one data set, the flow store of flow.py, the prototypes of prototypes.py.
Out  RUN/log.jsonl (one JSON object a line; the first holds command, commit and settings) and RUN/checkpoint.pt.

    torchrun --nproc-per-node 8 pretrain.py --dataset ucf101 --videos UCF-101 --splits ucfTrainTestlist \\
        --flow flow/ucf101 --prototypes prototypes.npz --out runs/ucf101
    python pretrain.py --dataset folder --videos my_videos --flow flow/mine --prototypes prototypes.npz --out runs/mine
    python pretrain.py --dataset folder --videos my_videos --views rgb --prototypes prototypes.npz --out runs/rgb

One step: each video's long and short crops of both views go through the two backbones and the
head to unit features, their products with the prototypes are the scores, the long crops' scores are
assigned (guided by the other view), and every crop predicts the assignments of the video's other
long crops. Of one view (--views) this is SwAV. The same command continues an interrupted run.

Watch `loss` against ln N (6.908 for 1000 prototypes): a loss that stays there has collapsed.
Defaults are the paper's; docs/paper.md lists what the paper leaves open and what was chosen.
"""

import hashlib
import math
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import data
import goca
import model
from support.batch_norm import synchronisation, synchronise_batch_norm
from support.checkpoints import save_run
from support.cli import command_line
from support.datasets import read_split
from support.distributed import (
    check_same_on_all_ranks,
    cores_per_process,
    gather_rows,
    rank_and_world,
    run_on_all_ranks,
    same_on_all_ranks,
    start_processes,
)
from support.epoch_batches import EpochBatches
from support.errors import BadInput
from support.files import load_arrays
from support.memory import check_memory, memory_warning
from support.optim import LARS, AdamW, learning_rate, scaled_rate, set_rate
from support.run import Run, continue_run, locked, named_failures
from support.segments import expand
from support.stores import FlowStore, RgbStore
from support.training_flags import choose_views, default_lead_epochs, parser, without_effect
from support.training_log import Log, against_out_of_memory, commit, plan
from support.watchdog import end_process_group


# ---------------------------------------------------------------------------------------------------------------------
# The step's mathematics
# ---------------------------------------------------------------------------------------------------------------------
def schedule(step, steps_per_epoch, s):
    """What a step's epoch says -> (prior_views, the view that ViCC leaves as it is, or None).

    prior_views: whether rgb's, and whether flow's assignment takes the other view's as its prior D'
    in Eq. 6. Below --guide-start neither does: both are assigned by Eq. 5, as in Sep. From there on
    both do (Eqs. 6, 7; the paper, with --guide-start 0). With --lead flow only rgb does while
    epoch < --lead-epochs: flow's target is its own (Eq. 5), so that rgb, which may be confident of
    colour first, can't spoil it; rgb's is guided by flow. --lead rgb likewise.
    """
    epoch = step // steps_per_epoch
    guided = s.method == "goca" and epoch >= s.guide_start
    leader = s.lead if epoch < s.lead_epochs else "none"
    idle = model.VIEWS[1 - epoch // s.alternate % 2]  # RGB learns first
    frozen = idle if s.method == "vicc" else None
    return tuple(guided and view != leader for view in model.VIEWS), frozen


def assign(batch_scores, s, prior_views):
    """log D of the whole batch (Eqs. 5-7): scores of the assigning crops [G, A, M, N] -> [G, A, M, N]."""
    if any(prior_views):
        return goca.guided_assign(batch_scores, s.lambda1, s.lambda2, s.iters,
                                  prior_sign=s.prior_sign, prior_views=prior_views, check_finite=False)
    return goca.assign(batch_scores, s.lambda1, iters=s.iters, check_finite=False)


def cross_view_loss(scores, log_d, temperature):
    """ViCC's loss: each assignment is predicted by all crops of both views but the one it comes from.

    scores [2, V, m, N], log_d [2, A, m, N] -> scalar, mean over samples and pairs.
    """
    with torch.autocast(scores.device.type, enabled=False):
        log_g = F.log_softmax(scores.float() / temperature, dim=-1)
        pairs = -torch.einsum("gamn,hvmn->gahv", log_d.exp(), log_g) / scores.shape[2]
    _, A, _, V = pairs.shape
    same_view, same_crop = torch.eye(2, device=pairs.device), torch.eye(A, V, device=pairs.device)
    own = same_view[:, None, :, None] * same_crop[:, None]  # [2, A, 2, V]
    return (pairs * (1 - own)).sum() / (2 * A * (2 * V - 1))


def own_samples(m, rows):
    """This process's m samples among the M of all -> their slice, and the weight of their mean.

    rows: the number of each process. The mean over processes of weight * mean is that over all.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows = rows or [m] * world
    first = sum(rows[:rank])
    return slice(first, first + m), m * world / sum(rows)


def step_loss(net, clips, s, prior_views, frozen=None, rows=None):
    """Loss of one step on this process's videos (Eqs. 12, 13); its mean over processes is that over all.

    rows: the number of videos of each process (default: as many as here).
    -> scalar; of the whole batch, scores of the assigning crops [G, 2, M, N] and their features
    [G, 2, M, d]; of this process, the scores of all crops [G, V, m, N].
    """
    core = net.module if isinstance(net, nn.parallel.DistributedDataParallel) else net
    features, scores = net(clips, frozen, scored=True)  # [G, V, m, d], [G, V, m, N]
    batch_features = gather_rows(features[:, :2], rows)  # [G, 2, M, d], of all processes
    batch_scores = core.scores(batch_features).detach()  # [G, 2, M, N]
    own, weight = own_samples(features.shape[2], rows)
    if any(prior_views):
        loss = goca.guided_loss(scores, n_assign=2, lambda1=s.lambda1, lambda2=s.lambda2,
                                temperature=s.temperature, iters=s.iters, prior_sign=s.prior_sign,
                                prior_views=prior_views, batch_scores=batch_scores,
                                first_row=own.start, check_finite=False)
    else:
        log_d = assign(batch_scores, s, prior_views)[:, :, own]  # [G, 2, m, N]
        loss = (cross_view_loss(scores, log_d, s.temperature) if s.method == "vicc" else
                goca.swapped_loss(scores, log_d, s.temperature, check_finite=False))
    return loss * weight, batch_scores, batch_features, scores.detach()


# ---------------------------------------------------------------------------------------------------------------------
# The training loop
# ---------------------------------------------------------------------------------------------------------------------
def train_steps(run, s, device):
    """All steps that are left -> exit status."""
    for batch in run:  # waits for data; signals, saving and stopping come between two steps
        lr = learning_rate(run.step, run.steps_per_epoch, s)  # warm-up, then a cosine
        set_rate(run.optimizer, lr)
        prior_views, frozen = schedule(run.step, run.steps_per_epoch, s)
        clips = data.augment(batch, device)  # both views, float32
        with run.gradient_sync():  # gradients are shared between processes once an update
            with model.precision(device):
                loss, batch_scores, features, scores = step_loss(run.net, clips, s, prior_views,
                                                                 frozen, run.rows)
            (loss * run.share).backward()
        run.update(loss)  # the optimizer's step, unless a gradient is not finite
        if run.log_due:
            log_d = assign(batch_scores, s, prior_views)
            run.log_line({"lr": lr, "guided": all(prior_views), "prior_views": prior_views,
                          **describe(log_d, features), **loss_by_view(scores, log_d, s, run.rows)})
    return run.status


@torch.no_grad()
def describe(log_d, features):
    """What to watch besides the loss: log D [G, A, M, N], unit features [G, A, M, d] -> numbers."""
    d = log_d.exp()
    top = log_d.argmax(-1)  # [G, A, M]
    entropy = -(d * log_d).sum(-1).mean((1, 2))  # [G], of an assignment, in nats; ln N: says nothing
    spread = torch.linalg.svdvals(features.flatten(1, 2).float().nan_to_num()).square()
    spread = spread / spread.sum(-1, keepdim=True)  # [G, min(A M, d)]
    # effective dimensions of a view's features: exp of the entropy of the squared singular values
    effective_rank = torch.special.entr(spread).sum(-1).exp()  # [G]
    out = {"entropy": entropy.mean().item(), "prototypes_in_use": top.unique().numel(),
           "rank": effective_rank.min().item(),  # of the poorer view
           "crops_agree": (top[:, 0] == top[:, 1]).float().mean().item()}
    if len(top) < 2:
        return out
    out["views_agree"] = (top[0] == top[1]).float().mean().item()
    for g, view in enumerate(model.VIEWS):
        out |= {f"entropy_{view}": entropy[g].item(),
                f"effective_rank_{view}": effective_rank[g].item(),
                f"prototypes_in_use_{view}": top[g].unique().numel()}
    return out


@torch.no_grad()
def loss_by_view(scores, log_d, s, rows):
    """Each view's part of the loss, where it has one: own scores [G, V, m, N], log D [G, A, M, N] -> dict."""
    if len(scores) < 2 or s.method == "vicc":
        return {}
    own, weight = own_samples(scores.shape[2], rows)
    losses = torch.stack([goca.swapped_loss(scores[g:g + 1], log_d[g:g + 1, :, own], s.temperature,
                                            check_finite=False) for g in (0, 1)]) * weight
    if dist.is_initialized():
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
    return {f"loss_{view}": loss for view, loss in zip(model.VIEWS, losses.tolist(), strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# The run: data, network, optimizer
# ---------------------------------------------------------------------------------------------------------------------
def train(s):
    """Pre-train with settings `s` (see `arguments`) -> exit status: 0 done, 128 + signal if asked to stop, EXIT_LOST
    where other processes ended or hung."""
    with end_process_group(), named_failures(against_out_of_memory(s), s.timeout):
        process = start_processes(s)
        with locked(Path(s.out), s, process[1]):
            return train_in(process, s)


def train_in(process, s):
    """`train` in a process of a group."""
    device, rank, world = process
    say = print if rank == 0 else lambda *_: None
    store, found, videos, clips, prototypes = run_on_all_ranks(lambda: read_data(s))
    core = network(s, prototypes, device, world)
    optimizer = make_optimizer(core, s)
    batches = EpochBatches(len(videos), s.batch_size, s.epochs, s.seed, rank, world, keep_last=s.keep_last)
    per_epoch = batches.steps_per_epoch
    settings = {**vars(s), "global_batch": s.batch_size * world, "flow_header": store and store.header,
                "rgb_fps": next((each.header.get("fps", 0) for each in (clips.rgb, clips.store) if each), 0),
                "train_videos": len(videos)}
    check_same_on_all_ranks(config_fingerprint(s, settings, videos, prototypes))
    out = Path(s.out)
    start, log_state = continue_run(out, s, settings, core, optimizer, per_epoch, say)
    compiled = goca.implementation(device) == "compiled"
    operator = f"compiled for {device.type}" if compiled else "PyTorch reference"
    say(plan(s, found, videos, core, batches, start, device, world, operator))
    if device.type == "cpu" and not s.compile and start < per_epoch * s.epochs:
        reckon = check_memory if s.plan else memory_warning
        if remark := run_on_all_ranks(lambda: reckon(s, prototypes)):
            say(remark)

    ln_n, total = math.log(len(core.prototypes)), per_epoch * s.epochs
    log = Log(out, s, rank, world, start, total, per_epoch, ln_n, log_state)
    if not s.plan and start < total:
        header = {"command": sys.argv, "commit": commit(), "torch": torch.__version__, "step": start, "ln_n": ln_n,
                  "videos": len(videos), "settings": settings}
        run_on_all_ranks(lambda: log.start(header) if rank == 0 else None)
    with Run(process, core.train(), optimizer, model.BatchNormStatistics(core), clips, batches, log,
             partial(save_run, out, keep=s.keep), file=out / "checkpoint.pt", settings=settings, start=start,
             advice=f"a learning rate too high (--lr {s.lr:.3g}), too small a lambda1 ({s.lambda1}), damaged weights",
             workers=s.workers, accumulate=s.accumulate, log_every=s.log_every, save_every=s.save_every,
             save_minutes=s.save_minutes, timeout=s.timeout, videos=len(videos), plan=s.plan,
             step_kind=(lambda step: schedule(step, per_epoch, s)) if s.compile else None,
             find_unused_parameters=s.method == "vicc") as run:
        return train_steps(run, s, device)


def network(s, prototypes, device, world):
    """The network of settings `s` on its device."""
    net = model.two_view(vars(s), prototypes).to(device, memory_format=torch.channels_last_3d)
    if world > 1 and s.sync_batch_norm != "none":
        net = synchronise_batch_norm(net, synchronisation(s.sync_batch_norm, device))
    for backbone in net.backbones.values():
        backbone.recompute = s.recompute
        if s.compile:
            backbone.compile(dynamic=False)  # the clips have two lengths: code for each, not for any
    return net


def make_optimizer(net, s):
    """LARS (the paper), or AdamW, which small batches and short runs learn faster with."""
    if s.optimizer == "adamw":
        return AdamW(net.parameters(), s.lr, (s.momentum, 0.99), s.weight_decay)
    return LARS(net.parameters(), s.lr, s.momentum, s.weight_decay, s.trust)


def read_data(s):
    """The training set of settings `s` -> FlowStore or None, VideoSet, its videos with what --views needs of stores,
    their TrainClips, and the prototypes [N, d]. Raises BadInput."""
    store = FlowStore(s.flow) if "flow" in s.views else None
    rgb = RgbStore(s.rgb) if s.rgb and "rgb" in s.views else None
    found = read_split(s.dataset, s.videos, s.splits, s.split, "train", s.index, None if "rgb" in s.views else store)
    stores = [each for each in (store, rgb) if each]
    if stores:
        found = found._replace(videos=expand(found.videos, stores[0], rgb, frames="rgb" in s.views))
    videos = [v for v in found.videos if all(v.name in each for each in stores)]
    if not videos:
        raise BadInput(f"{' or '.join(f'{each.root} holds the {each.KIND}' for each in stores)} of none of the "
                       f"{len(found.videos)} videos below {s.videos or s.flow}; run: python flow.py --videos "
                       f"{s.videos or 'DIR'} --out {s.flow or 'FLOW'}{f' --rgb {s.rgb}' if rgb else ''}")
    clips = data.TrainClips(videos, store, frames=s.frames, short_frames=s.short_frames, n_short=s.short_crops,
                            size=s.size, stride=s.stride, scale=tuple(s.scale), seed=s.seed, cache=s.cache,
                            time_limit=s.time_limit, rgb=rgb, views=tuple(s.views),
                            still_jitter=s.still_jitter)
    _, arrays = load_arrays(s.prototypes, "prototypes", f"python prototypes.py --out {s.prototypes}")
    return store, found, videos, clips, torch.from_numpy(arrays["prototypes"])


def config_fingerprint(s, settings, videos, prototypes):
    """What all processes must have alike -> dict of plain values."""
    own = {"device", "workers", "cache", "videos", "splits", "flow", "rgb", "prototypes", "out", "index", "init"}
    lists = {"list of videos": "\n".join(v.name for v in videos).encode(), "prototypes": prototypes.numpy().tobytes()}
    return {**{k: v for k, v in settings.items() if k not in own},
            **{k: hashlib.sha256(content).hexdigest()[:12] for k, content in lists.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------
def arguments(argv=None):
    """The settings of a run, checked; what the command says on its first process."""
    argv = sys.argv[1:] if argv is None else argv
    p = parser(every="--help-all" in argv)
    s = p.parse_args(argv)
    world = int(os.environ.get("WORLD_SIZE", 1))
    choose_views(s)
    if s.method == "avg" and s.heads == 2:
        raise BadInput("--method avg has one feature a clip, so no use for --heads 2")
    if s.method == "sview" and len(s.views) == 2 and s.train_prototypes:
        raise BadInput("--train-prototypes would be shared by the two networks of --method sview; train one at a time, "
                       "--views rgb and --views flow")
    if s.lead == "none" and s.lead_epochs:
        raise BadInput(f"--lead-epochs {s.lead_epochs}: which view leads is missing, --lead rgb or --lead flow")
    if s.compile and s.recompute:
        raise BadInput("--compile and --recompute don't go together: torch can't compile what is computed again")
    if why := model.too_small(s.arch, min(s.frames, s.short_frames) if s.short_crops else s.frames, s.size):
        raise BadInput(f"{why}: raise --frames, --short-frames or --size, or take --arch r2plus1d18")
    if s.scale is None:
        s.scale = list(data.default_scale(s.arch))
    if not 1 <= s.scale[0] <= s.scale[1]:
        raise BadInput(f"--scale {s.scale[0]} {s.scale[1]}: must be 1 <= LOW <= HIGH")
    notes = list(without_effect(s, p))
    if s.lead_epochs is None:
        s.lead_epochs = default_lead_epochs(s.lead, s.epochs)
    if s.short_crops and s.short_frames > s.frames:
        notes.append(f"--short-frames {s.short_frames} is more than --frames {s.frames}: short crops are the "
                     f"longer ones")
    if s.warmup_epochs > s.epochs // 2:
        notes.append(f"--warmup-epochs {s.warmup_epochs} is cut to {s.epochs // 2}, half of --epochs {s.epochs}")
        s.warmup_epochs = s.epochs // 2
    if s.batch_size * world < 2:
        raise BadInput("--batch-size 1: one video has no other to be assigned against, and nothing for batch norm to "
                       "normalise by; give 2 or more")
    if s.lr is None:
        s.lr = 0.001 if s.optimizer == "adamw" else scaled_rate(s.batch_size * s.accumulate * world)
    s.lr_start = s.lr_start if s.lr_start is not None else s.lr / 16
    s.lr_end = s.lr_end if s.lr_end is not None else s.lr / 1000
    if s.workers is None:
        s.workers = min(8, cores_per_process())
    for note in notes if rank_and_world()[0] == 0 else ():
        print(f"note: {note}")
    return s


def main():
    try:
        s = arguments()
    except BadInput as e:
        raise same_on_all_ranks(e) from None
    return train(s)


if __name__ == "__main__":
    command_line(main)
