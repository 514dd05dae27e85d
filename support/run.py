"""The one training loop: what pre-training, fine-tuning and the linear probe on clips have in common around a step.

    with Run(...) as run:
        for batch in run:                      # waits for data; signals, saving and stopping between steps
            ...                                # rate, augmentation
            with run.gradient_sync():          # gradients are shared between processes once an update
                ...                            # forward, loss, backward
            run.update(loss)                   # optimizer.step(), unless a gradient is not finite
            if run.log_due:
                run.log_line({...})
    return run.status                          # 0, or 128 + the signal that asked to stop

A step of the loop is a batch; `accumulate` batches make an update. The host waits for a GPU only to log and to save.
"""

import math
import sys
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.distributed as dist

from support.checkpoints import last_checkpoint, lock, lock_timeout, resume, start_from
from support.distributed import (
    MaxOverRanks,
    data_parallel,
    rank_and_world,
    run_on_all_ranks,
    run_on_first_rank,
    same_on_all_ranks,
)
from support.errors import EXIT_LOST, BadInput
from support.loader import Loader
from support.optim import check_weights, last_good, step_if_finite
from support.signals import IntervalTimer, StopSignals
from support.watchdog import Watchdog, is_peer_failure


class DroppedSteps:
    """Updates whose gradient was not finite, counted on the device: how many in a row, and in all."""

    MAX_IN_A_ROW = 5

    def __init__(self, device, row=0, dropped=0):
        self.counts = torch.tensor([row, dropped], dtype=torch.int32, device=device)

    def add(self, finite):
        bad = (~finite).to(torch.int32)
        row, dropped = self.counts.unbind()
        self.counts = torch.stack([(row + 1) * bad, dropped + bad])

    @property
    def row(self):
        """On the device, a number of `MaxOverRanks`."""
        return self.counts[0]

    def read(self):
        """-> row, dropped; the host waits for the device."""
        return self.counts.tolist()


class Run:
    """The batches of a training from its step `start` to the last one.

    process     (device, rank, world) of `start_processes`
    core        the module whose weights are saved; `net` is what the loop calls: in several processes it also shares
                the gradients
    statistics  model.BatchNormStatistics of core: batch norms forget a step that is dropped
    clips       a `loader.Clips`; batches: its epoch_batches.EpochBatches, from step 0
    log         training_log.Log or one with the same methods
    save        save(state), on the first process; state: settings, step, model, optimizer and log.entries()
    file        the checkpoint that it writes; advice: against gradients that are not finite; error messages name both
    videos      how many there are, where too many that can't be read end the run
    step_kind   step -> value; torch.compile compiles anew for each. None: it is not used

    In the loop: `net`, `step` and `rows` (videos of each process) of this batch, its `share` of the videos of its
    update, `is_update_step`, `log_due`. After it: `status`.
    """

    def __init__(self, process, core, optimizer, statistics, clips, batches, log, save, *, file, settings, advice,
                 start=0, workers=0, accumulate=1, log_every=math.inf, save_every=1, save_minutes=0.0, timeout=600.0,
                 videos=None, step_kind=None, plan=False, find_unused_parameters=False):
        self.device, self.rank, self.world = process
        self.core, self.optimizer, self.log, self.save, self.file = core, optimizer, log, save, file
        self.net = data_parallel(core, self.device, find_unused_parameters) if self.world > 1 else core
        self.settings, self.advice, self.plan, self.videos = settings, advice, plan, videos
        self.accumulate, self.log_every, self.save_every = accumulate, log_every, save_every
        self.batches, self.first, self.step, self.status = batches, start, start, 0
        self.steps_per_epoch = batches.steps_per_epoch
        self.total = batches.steps_per_epoch * batches.epochs
        # one pass over the batches of all epochs: the workers live as long as the run, each two batches ahead
        self.loader = Loader(clips, lambda done: batches.after(start + done), workers,
                             pin_memory=self.device.type == "cuda")
        self.statistics, self.last_statistics = statistics, statistics.read()  # of the last step that was done
        self.dropped = DroppedSteps(self.device, log.row, log.dropped)
        self.over_ranks, self.timer = MaxOverRanks(self.device, self.world), IntervalTimer(save_minutes)
        self.checkpoint_due, self.stop_requested = False, 0
        self.step_kind, self.compiled = step_kind, set()
        self.signals = StopSignals()
        self.watchdog = Watchdog(timeout if self.world > 1 else math.inf, self.rank, start,
                                 "A process that hangs holds up all; the same command continues from the last "
                                 "checkpoint")

    def __enter__(self):
        self.signals.__enter__()
        self.watchdog.__enter__()
        return self

    def __exit__(self, *exception):
        self.watchdog.__exit__(*exception)
        self.signals.__exit__(*exception)

    # --- the loop ---------------------------------------------------------------------------------------------------
    def __iter__(self):
        for batch in self.log.timed(self.loader):
            self._begin(batch)
            yield batch
            self.step += 1
            self.watchdog.beat(self.step)
            if self.plan:
                if self.log.planned(self.step, self.device.type):
                    return
            elif self._stop():
                return
        self.log.end(self.step)

    def _begin(self, batch):
        """What the loop asks for in this step."""
        self.faults, self.rows = batch["fault"], self.batches.rows(self.step)
        first = max(self.first, self.step - self.step % self.accumulate)
        last = min(self.step - self.step % self.accumulate + self.accumulate, self.total)  # of fewer at the end
        of_update = sum(sum(self.batches.rows(step)) for step in range(first, last))
        self.share, self.is_update_step = sum(self.rows) / of_update, self.step + 1 == last
        self.log_due = not self.plan and ((self.step + 1) % self.log_every == 0 or self.step + 1 == self.total)
        if self.step_kind:
            kind = (self.step_kind(self.step), *self.rows)
            if kind not in self.compiled:
                self.compiled.add(kind)
                self.watchdog.compiling()

    def gradient_sync(self):
        """A context for forward and backward: processes share gradients at an update's last batch only."""
        return nullcontext() if self.is_update_step or self.world == 1 else self.net.no_sync()

    def update(self, loss):
        """The optimizer's step, where this batch completes one, with what belongs to it; takes the batch's loss down.

        A gradient that is not finite changes neither weights, momenta nor running statistics; all processes have the
        same gradients, so it is dropped in all.
        """
        if self.is_update_step:
            finite = step_if_finite(self.optimizer)
            self.optimizer.zero_grad(set_to_none=True)
            if hasattr(self.core, "renormalise"):
                self.core.renormalise(finite)
            self.last_statistics = self.statistics.undo_unless(self.last_statistics, finite)
            self.dropped.add(finite)
        self.log.add(loss, self.faults, sum(self.rows))

    def log_line(self, values):
        """A line of the log for the steps since the last one; every process calls it."""
        self._check_dropped(self.step + 1)
        self.log.line(self.step + 1, values)

    # --- between two steps ------------------------------------------------------------------------------------------
    def _stop(self):
        """Ask all processes for signals, bad steps and failures; save where that is due -> whether the run stops."""
        signalled, timed, row = self.over_ranks(self.signals.signal, self.rank == 0 and self.timer(), self.dropped.row)
        if row >= DroppedSteps.MAX_IN_A_ROW:
            self._check_dropped(self.step)
        self.stop_requested = self.stop_requested or signalled
        self.checkpoint_due = (self.checkpoint_due or bool(timed) or self.step == self.total
                               or self.step % (self.save_every * self.steps_per_epoch) == 0)
        if not self.is_update_step:  # part of an update can't be saved
            return False
        # processes learn of each other's skipped videos where a line of the log is written
        count = self.videos and (self.world == 1 or self.log_due)
        too_many_failures = self.log.too_many_faults(self.videos) if count else None
        if self.checkpoint_due or self.stop_requested or too_many_failures:
            self._save()
        if not (self.stop_requested or too_many_failures):
            return False
        if self.world > 1:
            dist.barrier()  # torchrun and Slurm end all once one is gone, and the first may still be saving
        if too_many_failures:
            raise same_on_all_ranks(BadInput(too_many_failures))
        self.log.say(f"asked to stop (signal {self.stop_requested}): saved step {self.step} of {self.total}; the same "
                     f"command continues")
        self.status = 128 + self.stop_requested
        return True

    def _check_dropped(self, step):
        """Raise BadInput after too many bad steps in a row, before anything is saved; in every process."""
        self.log.row, self.log.dropped = self.dropped.read()
        if self.log.row >= DroppedSteps.MAX_IN_A_ROW:
            raise same_on_all_ranks(BadInput(
                f"the gradient was not finite in the last {self.log.row} steps before step {step}; "
                f"{last_good(self.file)}. Likely causes: {self.advice}"))

    def _save(self):
        self._check_dropped(self.step)
        run_on_all_ranks(partial(check_weights, self.core, self.step, self.file))
        self.checkpoint_due, entries = False, self.log.entries()
        if self.rank == 0:
            self.save({"settings": self.settings, "step": self.step, "model": self.core.state_dict(),
                       "optimizer": self.optimizer.state_dict(), **entries})


# ---------------------------------------------------------------------------------------------------------------------
# Before and after
# ---------------------------------------------------------------------------------------------------------------------
def continue_run(out, s, settings, core, optimizer, steps_per_epoch, say):
    """Continue from the newest checkpoint in `out`, or begin, from --init where that is given -> the next step, the
    log's state."""
    # one process reads: another may see the files of a moment ago, or none
    saved = run_on_first_rank(lambda: last_checkpoint(out, None if s.plan else s.keep))
    if saved is None and s.init:
        run_on_all_ranks(lambda: start_from(s.init, core, settings, say))
    return run_on_all_ranks(lambda: resume(saved, out, settings, core, optimizer, steps_per_epoch, say, s))


@contextmanager
def locked(out, s, rank):
    """No other run trains in `out` meanwhile."""
    with run_on_all_ranks(lambda: nullcontext() if rank or s.plan else lock(out, lock_timeout(s))):
        yield


@contextmanager
def named_failures(out_of_memory, timeout):
    """Within: what is no fault of the program gets an error message in place of a traceback.

    out_of_memory: what helps, in words. timeout: seconds that the others were waited for.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as e:
        reason = (str(e).strip().splitlines() or [""])[0]
        if isinstance(e, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in reason:
            raise BadInput(f"out of memory ({reason}) with {out_of_memory}") from e
        if "DataLoader worker" in reason:
            raise BadInput(f"a loader process ended ({' '.join(str(e).split())}). Of shared memory (/dev/shm): the "
                           f"container's --shm-size or --ipc=host, or --workers 0; of memory: fewer --workers, and no "
                           f"--cache") from e
        rank, world = rank_and_world()
        if world == 1 or not is_peer_failure(e):
            raise
        reason = reason.split(". This is typically")[0]  # gloo's advice
        print(f"error: process {rank} lost the others ({reason}): one ended, or hung for longer than "
              f"{timeout:g} s; look for its message. The same command continues from what was saved last",
              file=sys.stderr, flush=True)
        sys.exit(EXIT_LOST)
