"""The checkpoints of a run: how they are written, kept, and read again, and how a run continues from one.

RUN/checkpoint.pt is the newest; the `--keep` - 1 before it are checkpoint.1.pt (the newer), checkpoint.2.pt, ...
RUN/checkpoint.new.pt is one that was whole when the run was killed, and not yet renamed; RUN/*.damaged.pt could not be
read and were set aside; RUN/lock is held by the run that trains there.
"""

import errno
import io
import os
import pickle
import re
import shutil
import socket
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch

from support.errors import BadInput, TemporaryFailure
from support.files import atomic, writing
from support.locks import try_lock
from support.optim import learning_rate
from support.training_flags import default_lead_epochs

# settings that may change on resume
RESUMABLE = {"device", "workers", "cache", "log_every", "save_every", "videos", "splits", "flow", "rgb", "prototypes",
             "out", "index", "time_limit", "max_faults", "keep", "plan", "compile", "recompute", "timeout",
             "tensorboard", "save_minutes", "extend"}
# settings that earlier versions' checkpoints lack, and what they did
ADDED = {"lead": "none", "lead_epochs": 0, "still_jitter": 0.0, "init": None, "views": ["rgb", "flow"]}


class Damaged(BadInput):
    """A file whose content is no checkpoint."""


def save_checkpoint(path, state):
    """Write a dict of tensors and plain values; what stood at `path` stays whole until the new file is."""
    with atomic(path) as tmp, open(tmp, "wb") as f:  # a file of Python's: torch's own don't say why a write failed
        try:
            torch.save({"kind": "checkpoint", "version": 1, **state}, f)
        except RuntimeError as e:  # torch, as it closes a file that could not be written
            raise e.__context__ if isinstance(e.__context__, OSError) else e from None


def load_checkpoint(path):
    """Read a checkpoint, given its file or the folder of its run, onto the CPU.

    Raises BadInput where it is missing or may not be read, Damaged where it is damaged, of another version, or holds
    anything but tensors and plain values (torch.load(weights_only=True): a pickle that would run code is refused), and
    TemporaryFailure where the disk, the network or the memory failed, which says nothing about the file.
    """
    file = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    try:
        content = file.read_bytes()  # before torch: what fails here is not the content's fault
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{file} doesn't exist; pretrain.py writes it: give its --out folder, or a file from "
                       f"there") from None
    except MemoryError as e:
        raise TemporaryFailure(f"{file} does not fit into the memory that is left; it may be good") from e
    except OSError as e:
        kind = BadInput if e.errno in (errno.EACCES, errno.EPERM, errno.EISDIR) else TemporaryFailure
        raise kind(f"{file} can't be read ({e.strerror}); it may be good: check its permissions, its disk and the "
                   f"network, and the same command continues") from e
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as e:  # torch, zipfile and pickle each have their own words
        if isinstance(e, MemoryError) or "can't allocate memory" in str(e):
            raise TemporaryFailure(f"{file} does not fit into the memory that is left; it may be good") from e
        why = ("it is empty" if not content else
               "it holds more than tensors and plain values, which could run code and is not read"
               if isinstance(e, pickle.UnpicklingError) and content.startswith(b"PK\3\4") else
               "its content is cut off or overwritten")
        raise Damaged(f"{file} is damaged or no checkpoint of this project: {why}") from e
    if not isinstance(state, dict) or state.get("kind") != "checkpoint" or state.get("version") != 1:
        raise Damaged(f"{file} is no checkpoint of this project (version 1)")
    return state


def load_pretrained(path):
    """`load_checkpoint` of what pretrain.py wrote. Raises BadInput where it is a classifier's, of evaluate.py."""
    state = load_checkpoint(path)
    if "prototypes" not in state["model"]:
        raise BadInput(f"{path} is a classifier trained by evaluate.py; give the checkpoint of pretrain.py that it "
                       f"began with")
    return state


def save_run(out, state, keep):
    """Write RUN/checkpoint.pt and keep the `keep` - 1 before it.

    At any moment, and where the disk is full, one before is there whole.
    """
    new, newest = out / "checkpoint.new.pt", out / "checkpoint.pt"
    try:
        save_checkpoint(new, state)
    except BadInput as e:
        kept = f"{newest} is the one before: make room, and the same command continues"
        raise BadInput(f"step {state['step']} could not be saved: {e}; "
                       f"{kept if newest.exists() else 'nothing had been saved before'}") from e
    with writing(newest):
        _rotate(out, keep)


def _rotate(out, keep):
    """checkpoint.new.pt becomes checkpoint.pt, and that one of those before."""
    files = [out / "checkpoint.pt", *(out / f"checkpoint.{k}.pt" for k in range(1, keep))]
    for older, newer in reversed(list(zip(files[1:], files, strict=False))):
        if newer.exists():
            older.unlink(missing_ok=True)
            try:
                os.link(newer, older)  # checkpoint.pt stands until the new one replaces it
            except OSError:  # a file system without hard links
                shutil.copyfile(newer, older)
    os.replace(out / "checkpoint.new.pt", files[0])


def last_checkpoint(out, keep=None):
    """The newest checkpoint of a run that can be read, or None. A damaged one is named and the one before is taken.

    keep: as of `save_run`: what is damaged is set aside, lest the next save keep it in place of a good one, and what is
    taken becomes checkpoint.pt. Without it no file is touched.
    Raises Damaged if all that are there are damaged, and what `load_checkpoint` raises where one may be good.
    """
    older = {int(m[1]): p for p in out.glob("checkpoint.*.pt") if (m := re.fullmatch(r"checkpoint\.(\d+)\.pt", p.name))}
    newest, new = out / "checkpoint.pt", out / "checkpoint.new.pt"
    files = [f for f in (new, newest, *(older[k] for k in sorted(older))) if os.path.lexists(f)]
    damaged = []
    for file in files:
        try:
            state = load_checkpoint(file)
        except Damaged as e:
            if file == files[-1]:
                raise
            print(f"warning: {e}; taking the checkpoint before it", file=sys.stderr)
            damaged.append(file)
            continue
        if keep is not None:
            with writing(newest):
                for bad in damaged:
                    os.replace(bad, bad.with_suffix(".damaged.pt"))
                if file == new:
                    _rotate(out, keep)
                elif file != newest:
                    os.replace(file, newest)
        return state
    return None


def lock_timeout(s):
    """Seconds to wait for another run in --out: one that is started again may find its own last processes there."""
    again = os.environ.get("SLURM_RESTART_COUNT", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return min(120, s.timeout) if any(count != "0" for count in again) else 0


def lock(out, seconds=0.0):
    """Keep other runs out of `out`, and remove what a killed one left half written -> a context, at whose end (or that
    of this process) others may run there. Where the file system can't lock, a message says so.

    seconds: how long to wait for a run that is about to end. Raises BadInput, naming it, where there is one;
    TemporaryFailure after waiting, for a server may keep the lock of a machine that is gone for longer.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / "lock", "a+")
    except OSError as e:
        raise BadInput(f"--out {out} can't be written ({e.strerror}); choose a folder that can") from e
    until = time.monotonic() + seconds
    while (locked := try_lock(file, f"see to it that no two runs train in {out}")) is False:
        if time.monotonic() >= until:
            file.seek(0)
            raise (TemporaryFailure if seconds else BadInput)(
                f"another run is training in {out} ({file.read().strip() or 'unknown process'}): wait for its end, or "
                f"give another --out; if its machine is gone, remove {out / 'lock'}")
        time.sleep(1)
    if locked is None:
        file.close()
        return nullcontext()
    with writing(out / "lock"):
        file.truncate(0)
        print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
    for suffix in (".pt", ".jsonl"):
        for left in out.glob(f".tmp-*{suffix}"):
            left.unlink(missing_ok=True)
    return file


def changed_settings(old, settings):
    """-> {name: (before, now)} of what differs; --sync-batch-norm by whether it is, for all ways are one."""
    def meaning(name, value):
        return value not in (False, "none") if name == "sync_batch_norm" else value

    old = {**ADDED, **old}
    return {k: (old[k], v) for k, v in settings.items() if k in old and meaning(k, old[k]) != meaning(k, v)}


def resume(state, out, settings, net, optimizer, steps_per_epoch, say, s):
    """Continue from a checkpoint of `last_checkpoint`, or None -> the next step, the log's state; says which settings
    changed. With s.extend the epochs may be more than before, and s.warmup_epochs becomes the run's own.

    Raises BadInput where they do not allow it.
    """
    if state is None:
        return 0, None
    free = set(RESUMABLE)
    if s.extend:
        extend(state, out, settings, s, steps_per_epoch, say)
        free |= {"epochs"}
    changed = changed_settings(state["settings"], settings)
    # a process's share of the same whole batch is free, where batch norm does not tell
    if settings["sync_batch_norm"] not in (False, "none") and "global_batch" not in changed:
        free |= {"batch_size"}
    broken = {k: v for k, v in changed.items() if k not in free}
    if broken:
        what = ", ".join(f"{k} {a} -> {b}" for k, (a, b) in broken.items())
        longer = "epochs" in broken and broken["epochs"][0] < broken["epochs"][1]
        raise BadInput(f"{out} was trained with other settings ({what}); give another --out, or these as before"
                       f"{', or --extend for more epochs' if longer else ''}")
    check_prototypes(state, out, settings, net)
    if changed:
        say(f"changed since the run began: {', '.join(f'{k} {a} -> {b}' for k, (a, b) in changed.items())}")
    net.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state.get("log")


def check_prototypes(state, out, settings, net):
    """Refuse other prototypes than those of a checkpoint; trained ones may have any values."""
    before, now = state["model"]["prototypes"], net.prototypes.detach().cpu()
    if before.shape != now.shape:
        raise BadInput(f"{out} was trained with prototypes {list(before.shape)}, but --prototypes "
                       f"{settings['prototypes']} holds {list(now.shape)}")
    others = int(((before - now).abs() > 1e-6).any(1).sum())
    if others and not settings["train_prototypes"]:
        raise BadInput(f"{out} was trained with other prototypes: {others} of the {len(now)} in --prototypes "
                       f"{settings['prototypes']} differ; give another --out, or the file as before")


def extend(state, out, settings, s, steps_per_epoch, say):
    """--extend: keep the run's own warm-up and lead, and say what more epochs do to the learning rate."""
    old, step = state["settings"], state["step"]
    if s.epochs < old["epochs"]:
        raise BadInput(f"--extend lengthens a run: {out} was begun with --epochs {old['epochs']}, which is more than "
                       f"{s.epochs}")
    s.warmup_epochs = settings["warmup_epochs"] = old["warmup_epochs"]
    if s.lead_epochs == default_lead_epochs(s.lead, s.epochs):
        s.lead_epochs = settings["lead_epochs"] = {**ADDED, **old}["lead_epochs"]
    before = learning_rate(max(0, step - 1), steps_per_epoch, SimpleNamespace(**old))
    now = learning_rate(step, steps_per_epoch, s)
    if s.epochs > old["epochs"]:
        say(f"--extend: {old['epochs']} -> {s.epochs} epochs. The learning rate's cosine is stretched to the new "
            f"end: it was {before:.4g} in step {step} and goes on with {now:.4g}")


# ---------------------------------------------------------------------------------------------------------------------
# Weights to start from
# ---------------------------------------------------------------------------------------------------------------------
def start_from(path, net, settings, say):
    """--init: give a fresh network the weights of a run (its folder, or a checkpoint) or of an export.

    The backbones must fit; heads are taken over where they do, and prototypes where they are trained and fit. Says what
    was. Raises BadInput where the file is none, or is of another network.
    """
    state = _weights_of(path)
    own = net.state_dict()
    parts = {"backbones": "backbones.", "projection head": "heads.", "prototypes": "prototypes"}
    fits, said, views = {}, [], {view_of(k) for k in own if k.startswith("backbones.")}
    for part, prefix in parts.items():
        wanted = {k: v for k, v in own.items() if k.startswith(prefix)}
        # of a run of both views, one may go on alone
        have = {k: v for k, v in state.items()
                if k.startswith(prefix) and (part != "backbones" or view_of(k) in views)}
        fit = wanted.keys() == have.keys() and all(have[k].shape == v.shape for k, v in wanted.items())
        if part == "backbones" and not fit:
            amiss = next((k for k in wanted if k not in have or have[k].shape != wanted[k].shape), "more layers")
            raise BadInput(f"--init {path} holds another network than --arch {settings['arch']} --width "
                           f"{settings['width']:g} (first difference: {amiss}); give the flags that it was trained "
                           f"with")
        if part == "prototypes" and fit and not settings["train_prototypes"]:
            same = torch.allclose(have[prefix], wanted[prefix].cpu(), atol=1e-6)
            said.append(f"prototypes of --prototypes, {'the same' if same else 'not its own'}")
            continue
        fits |= have if fit else {}
        said.append(f"{part} {'taken over' if fit else 'new, for its own do not fit' if have else 'new'}")
    net.load_state_dict({**own, **fits})
    say(f"--init {path}: {'; '.join(said)}")


def view_of(name):
    """Of a backbone's tensor, backbones.VIEW. and so on."""
    return name.split(".")[1]


def _weights_of(path):
    """{name: tensor} as of a TwoView, from a run, a checkpoint or an export."""
    if Path(path).is_dir():
        return load_checkpoint(path)["model"]
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # says what is wrong with it
        state = load_checkpoint(path)
    if isinstance(state, dict) and state.get("kind") == "backbones":
        return {f"backbones.{view}.{k}": t for view in ("rgb", "flow") for k, t in state.get(view, {}).items()}
    return load_checkpoint(path)["model"]
