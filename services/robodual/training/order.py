"""Which samples a step of the training sees: a function of the seed and the step, so that any step can be resumed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from robodual.training.annotations import DatasetError
from robodual.training.dataset import Key


@dataclass(frozen=True)
class Order(Sampler[list[Key]]):
    """Endless batches of one process, from optimiser step `first_step` on.

    Every epoch is shuffled anew by (seed, epoch) and its last, incomplete global batch left out. A global batch is the
    same set of samples however it is split over processes and accumulation.

    Raises:
        DatasetError: if there are fewer samples than a global batch has.
    """

    length: int
    batch_size: int  # of one forward pass of one process
    accumulation: int = 1  # forward passes before an optimiser step
    rank: int = 0
    processes: int = 1
    seed: int = 0
    first_step: int = 0

    def __post_init__(self) -> None:
        if self.length < self.global_batch:
            raise DatasetError(
                f"the data set has {self.length} windows, fewer than one global batch of {self.global_batch} "
                f"(batch_size {self.batch_size} x accumulation {self.accumulation} x processes {self.processes})"
            )

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation * self.processes

    @property
    def steps_an_epoch(self) -> int:
        return self.length // self.global_batch

    def __iter__(self) -> Iterator[list[Key]]:
        step = self.first_step
        while True:
            epoch = step // self.steps_an_epoch
            shuffled = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            for position in range(step % self.steps_an_epoch, self.steps_an_epoch):
                for part in self._parts(shuffled[position * self.global_batch :]):
                    yield [(epoch, int(index)) for index in part]
                step += 1

    def _parts(self, batch: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.int64]]:
        for turn in range(self.accumulation):
            first = (turn * self.processes + self.rank) * self.batch_size
            yield batch[first : first + self.batch_size]
