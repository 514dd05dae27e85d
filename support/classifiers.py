"""Classifiers on the pre-trained backbones: linear probe and fine-tuning (section 4.4, Tables 7 and 8).

A classifier is the mean feature of its views' backbones, then L2 and batch norm where its recipe has them, dropout and
one linear layer. The paper follows [37, 67, 80] here without numbers: `LINEAR` and `FINETUNE` hold what ViCC [80],
CoCLR [37] and the released code do. A result is that of the last epoch: the test set chooses nothing.
"""

import copy
import hashlib
import json
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import model
from support.batch_norm import synchronisation, synchronise_batch_norm
from support.checkpoints import load_checkpoint, save_checkpoint
from support.cli import say
from support.distributed import run_on_all_ranks, run_on_first_rank
from support.epoch_batches import EpochBatches
from support.errors import BadInput
from support.features import fingerprint
from support.files import atomic, check_folder
from support.inference import group_by_views, mean_over_views
from support.loader import Loader
from support.locks import only_these_processes
from support.optim import SGD, Adam, set_rate
from support.run import Run, named_failures
from support.watchdog import exit_on_error

TIMEOUT = 600.0  # seconds of a step in which several processes wait for one


class Recipe(NamedTuple):
    optimizer: str
    lr: float
    weight_decay: float
    epochs: int
    milestones: tuple  # shares of the epochs after which lr falls to a tenth; empty: cosine to 0
    l2: bool = False
    batch_norm: bool = False
    dropout: float = 0.0
    backbone: float = 1.0  # learning rate of the backbone over that of the linear layer


LINEAR = {"vicc": Recipe("sgd", 0.1, 1e-3, 100, (0.6, 0.8), l2=True, batch_norm=True),
          "released": Recipe("sgd", 0.3, 1e-6, 100, (), batch_norm=True)}
# Of CoCLR's fine-tuning the optimizer and both rates are known here; epochs, milestones and dropout are ViCC's. "plain"
# is ours: narrow networks learn from scratch by it, too.
FINETUNE = {"vicc": Recipe("sgd", 0.1, 1e-3, 500, (0.4, 0.6, 0.8, 0.9), dropout=0.9),
            "coclr": Recipe("adam", 1e-3, 1e-3, 500, (0.4, 0.6, 0.8, 0.9), dropout=0.9, backbone=0.1),
            "plain": Recipe("adam", 3e-3, 1e-4, 80, ())}


class Classifier(nn.Module):
    """Backbones of some views (none: on stored features) and the layers above them.

    frozen: the backbones stay in eval mode and get no gradient.
    """

    def __init__(self, backbones, dim, classes, recipe, frozen):
        super().__init__()
        self.backbones, self.l2, self.frozen = nn.ModuleDict(backbones), recipe.l2, frozen
        self.backbones.requires_grad_(not frozen)
        linear = nn.Linear(dim, classes)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)
        self.head = nn.Sequential(nn.BatchNorm1d(dim) if recipe.batch_norm else nn.Identity(),
                                  nn.Dropout(recipe.dropout), linear)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.backbones.eval()
        return self

    def of_features(self, each):
        """Features of the views, a list of [B, D] -> logits [B, classes]."""
        if self.l2:
            return self.head(F.normalize(sum(F.normalize(f, dim=1) for f in each), dim=1))
        return self.head(sum(each) / len(each))

    def forward(self, clips):
        """Clips {view: [B, C, T, S, S]} -> logits [B, classes]."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            each = [backbone(clips[view]) for view, backbone in self.backbones.items()]
        return self.of_features(each)


def classifier_optimizer(classifier, recipe):
    groups = [{"params": list(classifier.head.parameters()), "scale": 1.0}]
    if not classifier.frozen:
        groups.append({"params": list(classifier.backbones.parameters()), "scale": recipe.backbone})
    if recipe.optimizer == "adam":
        return Adam(groups, recipe.lr, recipe.weight_decay)
    return SGD(groups, recipe.lr, 0.9, recipe.weight_decay)


def recipe_rate(step, per_epoch, recipe):
    """Of the linear layer; `step` counts from 0. Fewer epochs than the recipe's keep the shape of its schedule."""
    if not recipe.milestones:
        return recipe.lr * (1 + math.cos(math.pi * step / (per_epoch * recipe.epochs))) / 2
    return recipe.lr * 0.1 ** sum(step // per_epoch >= round(m * recipe.epochs) for m in recipe.milestones)


def classifier_step(logits, labels, optimizer, lr, where):
    """One step on stored features -> the loss. Raises BadInput where it is not finite."""
    loss = F.cross_entropy(logits.float(), labels)
    value = loss.item()
    if not math.isfinite(value):
        raise BadInput(f"the loss of {where} is no longer finite; try a smaller --lr")
    set_rate(optimizer, lr)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return value


def check_batch(classifier, batch):
    """Refuse batches of one video where a batch norm learns: it would normalise that one to nothing."""
    norms = [m for m in (classifier.head if classifier.frozen else classifier).modules()
             if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if batch < 2 and norms:
        raise BadInput("--batch-size 1: batch norm needs the statistics of at least 2 videos; give 2 or more, and as "
                       "many training videos")


def fit_features(train, labels, classes, recipe, s, device, what):
    """A linear layer on stored features: train [[n, D] of each view], labels [n] -> Classifier without backbones."""
    torch.manual_seed(s.seed)
    classifier = Classifier({}, train[0].shape[1], classes, recipe, frozen=True).to(device)
    optimizer = classifier_optimizer(classifier, recipe)
    check_batch(classifier, s.batch_size)
    batches = EpochBatches(len(labels), s.batch_size, recipe.epochs, s.seed)
    train, labels = [f.to(device) for f in train], labels.to(device)
    for step, batch in enumerate(tqdm(batches, desc=what, unit="step", mininterval=1)):
        at = torch.tensor([i for _, i in batch], device=device)
        classifier_step(classifier.of_features([f[at] for f in train]), labels[at], optimizer,
                        recipe_rate(step, batches.steps_per_epoch, recipe), what)
    return classifier.eval()


@torch.inference_mode()
def predict_features(classifier, test, device):
    """Stored features [[n, D] of each view] -> class probabilities [n, classes]."""
    return classifier.of_features([f.to(device) for f in test]).softmax(1).cpu()


def saved_state(path, settings, free=()):
    """The checkpoint at `path` that a run with these settings may continue, or None where there is none.

    free: settings that may change. Raises BadInput, naming them, where others have.
    """
    if not path.exists():
        return None
    state = load_checkpoint(path)
    old = state["settings"]
    changed = {k: (old[k], v) for k, v in settings.items() if k in old and old[k] != v and k not in free}
    if changed:
        what = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items())
        raise BadInput(f"{path.parent} was trained with other settings ({what}); give another --out, or these as "
                       f"before")
    return state


class EpochLog:
    """Progress on the terminal, and the mean loss and learning rate of each epoch: what `Run` asks of a log.

    before: the checkpoint that is continued, or None.
    """

    def __init__(self, what, total, steps_per_epoch, rank, start, before):
        before = before or {}
        self.history, (loss, self.count) = before.get("history", []), before.get("running", [0.0, 0])
        self.loss = torch.tensor(loss, dtype=torch.float64)
        self.row, self.dropped, self.faults = before.get("row", 0), before.get("dropped", 0), set()
        self.steps_per_epoch, self.rank = steps_per_epoch, rank
        self.progress = tqdm(total=total, initial=start, desc=what, unit="step", mininterval=1, disable=rank > 0)

    def timed(self, loader):
        return loader

    def add(self, loss, faults, videos):
        self.loss = self.loss.to(loss.device) + loss.detach().double()  # on the device
        self.count += 1
        self.faults.update(filter(None, faults))
        self.progress.update()

    def line(self, step, values):
        """The end of an epoch."""
        self.history.append({"epoch": step // self.steps_per_epoch, "loss": self.loss.item() / self.count, **values})
        self.progress.set_postfix(epoch=self.history[-1]["epoch"], loss=self.history[-1]["loss"])
        self.loss, self.count = torch.zeros_like(self.loss), 0

    def entries(self):
        return {"history": self.history, "running": [self.loss.item(), self.count], "row": self.row,
                "dropped": self.dropped}

    def say(self, text):
        if self.rank == 0:
            say(text)

    def end(self, step):
        self.progress.close()
        if self.dropped:
            self.say(f"{self.dropped} steps had a gradient that was not finite and changed nothing")
        if self.faults:
            say(f"{len(self.faults)} training videos could not be read and were replaced by others; one: "
                f"{min(self.faults)}")


def videos_and_labels(found):
    """What tells the training videos of a VideoSet, with their labels and their classes' names, from others."""
    each = [[(v.name, v.label) for v in found.videos], found.classes]
    return hashlib.sha256(json.dumps(each).encode()).hexdigest()[:16]


def new_classifier(net, views, classes, recipe, s, frozen, device):
    """A Classifier on copies of a network's backbones, on its device."""
    torch.manual_seed(s.seed)
    backbones = {v: copy.deepcopy(net.backbones[v]) for v in views}
    classifier = Classifier(backbones, net.backbones[views[0]].feature_dim, classes, recipe, frozen)
    return classifier.to(device, memory_format=torch.channels_last_3d)


def fit_clips(net, views, found, store, recipe, s, settings, frozen, what, device, rank, world, rgb=None):
    """Train a classifier on augmented clips, one a video and epoch -> Classifier in eval mode.

    Keeps OUT/<what>.pt once an epoch and OUT/<what>.json (loss and learning rate by epoch); the same command continues.
    Leaves with 128 + signal if asked to stop. Raises AssertionError if a frozen backbone changed in any bit.
    """
    classifier = new_classifier(net, views, len(found.classes), recipe, s, frozen, device)
    check_batch(classifier, s.batch_size * world)
    before = fingerprint(classifier.backbones)
    learning = classifier.head if frozen else classifier
    if world > 1:
        synchronise_batch_norm(learning, synchronisation("auto", device))
    optimizer = classifier_optimizer(classifier, recipe)
    settings = {**settings, **recipe._asdict(), "milestones": list(recipe.milestones), "weights": before,
                "views": views, "batch": s.batch_size * world, "seed": s.seed, "videos": len(found.videos),
                "frozen": frozen, "videos and labels": videos_and_labels(found),
                "flow": store.header if "flow" in views else None, "rgb": rgb.header if rgb else None}
    path = Path(s.out) / f"{what}.pt"
    state = run_on_first_rank(lambda: saved_state(path, settings))
    if state:
        classifier.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    start = state["step"] if state else 0
    clips = data.TrainClips(found.videos, store, frames=settings["frames"], n_long=1, n_short=0, size=settings["size"],
                            stride=settings["stride"], scale=tuple(settings["scale"]), seed=s.seed, cache=s.cache,
                            views=tuple(views), rgb=rgb)
    batches = EpochBatches(len(found.videos), s.batch_size, recipe.epochs, s.seed, rank, world)
    alone = nullcontext()
    if start < batches.steps_per_epoch * recipe.epochs:
        run_on_all_ranks(lambda: check_folder(s.out, "--out"))
        alone = only_these_processes(path, "evaluate.py", rank)
    log = EpochLog(what, batches.steps_per_epoch * recipe.epochs, batches.steps_per_epoch, rank, start, state)
    labels = torch.tensor([v.label for v in found.videos])
    memory = f"--batch-size {s.batch_size}. What helps: a smaller --batch-size or --size, fewer --frames"
    with alone, exit_on_error(), named_failures(memory, TIMEOUT), Run(
            (device, rank, world), classifier.train(), optimizer, model.BatchNormStatistics(learning), clips, batches,
            log, partial(save, path), file=path, settings=settings, start=start, workers=s.workers,
            log_every=batches.steps_per_epoch, timeout=TIMEOUT,
            advice=f"a learning rate too high (--lr {recipe.lr:g}), damaged weights") as run:
        if fit_steps(run, labels, recipe, s, device):
            raise SystemExit(run.status)
    if frozen and fingerprint(classifier.backbones) != before:
        raise AssertionError("a frozen backbone changed during the linear probe")
    return classifier.eval()


def fit_steps(run, labels, recipe, s, device):
    """All steps of `fit_clips` that are left -> exit status."""
    for batch in run:
        torch.manual_seed((s.seed * 2**20 + run.step) * run.world + run.rank)  # dropout; a continued run draws the same
        lr = recipe_rate(run.step, run.steps_per_epoch, recipe)
        set_rate(run.optimizer, lr)
        clips = {v: c[:, 0] for v, c in data.augment(batch, device)[0].items()}
        with model.precision(device):
            logits = run.net(clips)
        loss = F.cross_entropy(logits.float(), labels[batch["index"]].to(device))
        loss.backward()
        run.update(loss)
        if run.log_due:
            run.log_line({"lr": lr})
    return run.status


def save(path, state):
    """OUT/<what>.pt, and OUT/<what>.json beside it."""
    save_checkpoint(path, state)
    with atomic(path.with_suffix(".json")) as tmp:
        tmp.write_text(json.dumps({"settings": state["settings"], "history": state["history"]}))


@torch.inference_mode()
def predict_clips(classifier, found, store, s, device, what, rank, world, rgb=None):
    """Class probabilities of test videos, the mean of the softmax over their test views.

    -> (probabilities of all videos of `found` [n, classes], {place of one that can't be read: its fault}, whose
    probabilities are 0).
    """
    views = tuple(v for v in model.VIEWS if v in classifier.backbones)
    clips = data.TestClips(found.videos, store, views=views, protocol=s.protocol, frames=s.frames, size=s.size,
                           stride=s.stride, rgb=rgb)
    own = range(rank, len(found.videos), world)
    loader = Loader(clips, lambda done: {"sampler": own[done:], "batch_size": None}, s.workers)
    rows, faults = {}, {}
    for group in group_by_views(tqdm(loader, desc=what, unit="video", mininterval=1, disable=rank > 0), s.batch_views):
        faults |= {i["index"]: i["fault"] for i in group if "fault" in i}
        group = [i for i in group if "fault" not in i]
        if group:
            p = mean_over_views(lambda x: {"p": classifier(x).float().softmax(1)}, group, views, device, s.batch_views)
            rows |= dict(zip((i["index"] for i in group), p["p"], strict=True))
    if world > 1:
        every = [None] * world
        dist.all_gather_object(every, (rows, faults))
        rows = {i: p for r, _ in every for i, p in r.items()}
        faults = {i: fault for _, some in every for i, fault in some.items()}
    if not rows:
        raise BadInput(f"none of the {len(found.videos)} test videos can be read; the first: {faults[min(faults)]}")
    unread = torch.zeros_like(next(iter(rows.values())))
    return torch.stack([rows.get(i, unread) for i in range(len(found.videos))]), faults
