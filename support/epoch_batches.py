"""Which videos make each batch of a run, in any number of processes and from any step."""

import copy

import numpy as np
from torch.utils.data import Sampler

from support.errors import BadInput


class EpochBatches(Sampler):
    """Batches of (epoch, index) for one process out of `world`, from global step `start` to the last epoch's end.

    Every epoch is a new permutation from (seed, epoch); the global batch is the same however many processes share it.
    What does not fill a batch is left out, as in SwAV, or, with keep_last, is an epoch's last and smaller one: parts
    that differ by one video at most, and left out only where a process would have none, or the batch one.
    """

    def __init__(self, n, batch_size, epochs, seed=0, rank=0, world=1, start=0, keep_last=False):
        self.batch, rest = batch_size * world, n % (batch_size * world)
        self.rest = rest if keep_last and rest >= max(2, world) else 0
        self.steps_per_epoch = n // self.batch + (self.rest > 0)
        if n < self.batch:
            cure = f"choose {n // world} or less" if n // world > 1 else "there must be more of them"
            raise BadInput(f"--batch-size {batch_size} x {world} process(es) is more than the {n} videos there are; "
                           f"{cure}")
        self.n, self.batch_size, self.epochs, self.seed = n, batch_size, epochs, seed
        self.rank, self.world, self.start = rank, world, start

    def __len__(self):
        return self.steps_per_epoch * self.epochs - self.start

    def after(self, done):
        """For `Loader`: the batches from the `done`-th on."""
        rest = copy.copy(self)
        rest.start += done
        return {"batch_sampler": rest}

    def rows(self, step):
        """The number of videos of each process in a global step."""
        last = self.rest and step % self.steps_per_epoch == self.steps_per_epoch - 1
        size, more = divmod(self.rest if last else self.batch, self.world)
        return [size + (rank < more) for rank in range(self.world)]

    def __iter__(self):
        for epoch in range(self.start // self.steps_per_epoch, self.epochs):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
            first = self.start % self.steps_per_epoch if epoch == self.start // self.steps_per_epoch else 0
            for step in range(first, self.steps_per_epoch):
                rows = self.rows(step)
                at = step * self.batch + sum(rows[:self.rank])
                yield [(epoch, int(i)) for i in order[at:at + rows[self.rank]]]
