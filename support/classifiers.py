"""Classifiers on the pre-trained backbones: linear probe and fine-tuning (section 4.4, Tables 7 and 8).

A classifier is the mean feature of its views' backbones, then L2 and batch norm where its recipe has them, dropout and
one linear layer. The paper follows [37, 67, 80] here without numbers: `LINEAR` and `FINETUNE` hold what ViCC [80],
CoCLR [37] and the released code do. A result is that of the last epoch: the test set chooses nothing.
"""

import copy
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
import model
from support.batch_norm import synchronise_batch_norm
from support.checkpoints import load_checkpoint, save_checkpoint
from support.distributed import MaxOverRanks, data_parallel
from support.errors import BadInput
from support.features import fingerprint
from support.files import atomic
from support.inference import group_by_views, mean_over_views
from support.loader import Loader
from support.signals import StopSignals


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
# Of CoCLR's fine-tuning the optimizer and both rates are known here; epochs, milestones and dropout are ViCC's.
FINETUNE = {"vicc": Recipe("sgd", 0.1, 1e-3, 500, (0.4, 0.6, 0.8, 0.9), dropout=0.9),
            "coclr": Recipe("adam", 1e-3, 1e-3, 500, (0.4, 0.6, 0.8, 0.9), dropout=0.9, backbone=0.1)}


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
        return torch.optim.Adam(groups, recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(groups, recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)


def recipe_rate(step, per_epoch, recipe):
    """Of the linear layer; `step` counts from 0. Fewer epochs than the recipe's keep the shape of its schedule."""
    if not recipe.milestones:
        return recipe.lr * (1 + math.cos(math.pi * step / (per_epoch * recipe.epochs))) / 2
    return recipe.lr * 0.1 ** sum(step // per_epoch >= round(m * recipe.epochs) for m in recipe.milestones)


def classifier_step(logits, labels, optimizer, lr, where):
    """One step -> the loss. Raises BadInput where it is not finite."""
    loss = F.cross_entropy(logits.float(), labels)
    value = loss.item()
    if not math.isfinite(value):
        raise BadInput(f"the loss of {where} is no longer finite; try a smaller --lr")
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return value


def fit_features(train, labels, classes, recipe, s, device, what):
    """A linear layer on stored features: train [[n, D] of each view], labels [n] -> Classifier without backbones."""
    torch.manual_seed(s.seed)
    classifier = Classifier({}, train[0].shape[1], classes, recipe, frozen=True).to(device)
    optimizer = classifier_optimizer(classifier, recipe)
    batches = data.EpochBatches(len(labels), s.batch_size, recipe.epochs, s.seed)
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
    changed = {k: (old.get(k), v) for k, v in settings.items() if old.get(k) != v and k not in free}
    if changed:
        what = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in changed.items())
        raise BadInput(f"{path.parent} was trained with other settings ({what}); give another --out, or these as "
                       f"before")
    return state


def fit_clips(net, views, found, store, recipe, s, settings, frozen, what, device, rank, world):
    """Train a classifier on augmented clips, one a video and epoch -> Classifier in eval mode.

    Keeps OUT/<what>.pt once an epoch and OUT/<what>.json (loss and learning rate by epoch); the same command continues.
    Leaves with 128 + signal if asked to stop. Raises AssertionError if a frozen backbone changed in any bit.
    """
    torch.manual_seed(s.seed)
    backbones = {v: copy.deepcopy(net.backbones[v]) for v in views}
    classifier = Classifier(backbones, net.backbones[views[0]].feature_dim, len(found.classes), recipe, frozen)
    classifier = classifier.to(device, memory_format=torch.channels_last_3d)
    before = fingerprint(classifier.backbones)
    if world > 1:
        synchronise_batch_norm(classifier if not frozen else classifier.head)
    optimizer = classifier_optimizer(classifier, recipe)
    path = Path(s.out) / f"{what}.pt"
    settings = {**settings, **recipe._asdict(), "milestones": list(recipe.milestones), "weights": before,
                "views": views, "batch": s.batch_size * world, "seed": s.seed, "videos": len(found.videos),
                "frozen": frozen}
    state = saved_state(path, settings)
    step, history, running = 0, [], [0.0, 0]
    if state:
        classifier.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, history, running = state["step"], state["history"], state["running"]

    clips = data.TrainClips(found.videos, store, frames=settings["frames"], n_long=1, n_short=0, size=settings["size"],
                            stride=settings["stride"], scale=tuple(settings["scale"]), seed=s.seed, cache=s.cache)
    batches = data.EpochBatches(len(found.videos), s.batch_size, recipe.epochs, s.seed, rank, world, start=step)
    per_epoch, total = batches.steps_per_epoch, batches.steps_per_epoch * recipe.epochs
    loader = Loader(clips, batches.after, s.workers)
    labels = torch.tensor([v.label for v in found.videos])
    ddp = classifier
    if world > 1:
        ddp = data_parallel(classifier, device)
    ddp.train()
    skipped, agree = set(), MaxOverRanks(device, world)
    with StopSignals() as stop, tqdm(total=total, initial=step, desc=what, unit="step", mininterval=1,
                                     disable=rank > 0) as progress:
        for batch in loader:
            torch.manual_seed((s.seed * 2**20 + step) * world + rank)  # dropout; a continued run draws the same
            with model.precision(device):
                logits = ddp({v: c[:, 0] for v, c in data.augment(batch, device)[0].items()})
            lr = recipe_rate(step, per_epoch, recipe)
            running[0] += classifier_step(logits, labels[batch["index"]].to(device), optimizer, lr, what)
            running[1] += 1
            skipped.update(filter(None, batch["fault"]))
            step += 1
            progress.update()
            ending = step % per_epoch == 0
            if ending:
                history.append({"epoch": step // per_epoch, "loss": running[0] / running[1], "lr": lr})
                progress.set_postfix(epoch=step // per_epoch, loss=history[-1]["loss"])
                running = [0.0, 0]
            asked, = agree(stop.signal)
            if (ending or asked) and rank == 0:
                save_checkpoint(path, {"settings": settings, "step": step, "model": classifier.state_dict(),
                                            "optimizer": optimizer.state_dict(), "history": history,
                                            "running": running})
                with atomic(path.with_suffix(".json")) as tmp:
                    tmp.write_text(json.dumps({"settings": settings, "history": history}))
            if asked:
                if rank == 0:
                    print(f"asked to stop (signal {asked}): saved step {step} of {total}; the same command continues")
                raise SystemExit(128 + asked)
    if skipped:
        print(f"{len(skipped)} training videos could not be read and were replaced by others; one: {min(skipped)}")
    if frozen and fingerprint(classifier.backbones) != before:
        raise AssertionError("a frozen backbone changed during the linear probe")
    return classifier.eval()


@torch.inference_mode()
def predict_clips(classifier, found, store, s, device, what, rank, world):
    """Class probabilities of test videos, the mean of the softmax over their test views.

    -> (probabilities [n, classes], places in found.videos of the n that could be read, faults).
    """
    clips = data.TestClips(found.videos, store, protocol=s.protocol, frames=s.frames, size=s.size, stride=s.stride)
    own = range(rank, len(found.videos), world)
    loader = Loader(clips, lambda done: {"sampler": own[done:], "batch_size": None}, s.workers)
    views, rows, faults = [v for v in model.VIEWS if v in classifier.backbones], {}, []
    for group in group_by_views(tqdm(loader, desc=what, unit="video", mininterval=1, disable=rank > 0), s.batch_views):
        faults += [i["fault"] for i in group if "fault" in i]
        group = [i for i in group if "fault" not in i]
        if group:
            p = mean_over_views(lambda x: {"p": classifier(x).float().softmax(1)}, group, views, device, s.batch_views)
            rows |= dict(zip((i["index"] for i in group), p["p"], strict=True))
    if world > 1:
        every = [None] * world
        dist.all_gather_object(every, (rows, faults))
        rows = {i: p for r, _ in every for i, p in r.items()}
        faults = [f for _, fs in every for f in fs]
    if not rows:
        raise BadInput(f"none of the {len(found.videos)} test videos can be read; the first: {faults[0]}")
    kept = sorted(rows)
    return torch.stack([rows[i] for i in kept]), kept, faults
