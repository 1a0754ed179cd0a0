"""Draw batches as a function of the seed, the step and the rank, so that a run can resume from the step alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokdyn.data.base import Dataset
from tokdyn.data.hashing import Purpose, hashed, permutation
from tokdyn.data.loading import load_in_order
from tokdyn.errors import DataError


class BatchStream(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """An endless sequence of batches over a data set of n samples, shuffled anew in every epoch.

    A counter numbers the samples of all epochs: counter c is at position c % n of epoch c // n. In step s, all ranks
    together take the counters s * G to (s + 1) * G - 1, where G = batch_size * world, and each rank takes a contiguous
    part of them. So no sample repeats within an epoch, a batch may span two epochs, and for the same G the ranks
    together see the same samples however many there are.
    """

    def __init__(
        self, dataset: Dataset, batch_size: int, seed: int, rank: int = 0, world: int = 1, flip: bool = False
    ) -> None:
        """Check the settings.

        Args:
            dataset: the samples.
            batch_size: samples per step and rank (B).
            seed: seed of the order and of the flips.
            rank: rank of this process, 0 to world - 1.
            world: number of processes.
            flip: mirror each sample left to right with probability 1/2, drawn from (seed, counter).

        Raises:
            DataError: a setting is out of range, the data set is empty, or its samples cannot be mirrored.
        """
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}: set it to 1 or more.")
        if not 0 <= rank < world:
            raise DataError(f"rank is {rank}, expected 0 to {world - 1} for {world} process(es).")
        if len(dataset) == 0:
            raise DataError("The data set is empty: give one with at least one sample.")
        if flip:
            dataset.require_flip()
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.flip = flip
        self._orders: dict[int, NDArray[np.int64]] = {}

    def counters(self, step: int) -> NDArray[np.int64]:
        """Return the counters (B,) of this rank's samples in a step."""
        if step < 0:
            raise IndexError(f"step {step} is negative")
        start = (step * self.world + self.rank) * self.batch_size
        return np.arange(start, start + self.batch_size, dtype=np.int64)

    def indices(self, step: int) -> NDArray[np.int64]:
        """Return the indices (B,) in the data set of this rank's samples in a step."""
        counters = self.counters(step)
        epochs, places = np.divmod(counters, len(self.dataset))
        indices = np.empty_like(counters)
        for epoch in np.unique(epochs):
            current = epochs == epoch
            indices[current] = self._order(int(epoch))[places[current]]
        return indices

    def flips(self, step: int) -> NDArray[np.bool_] | None:
        """Return for a step (B,) booleans, True for samples to mirror; None if `flip` is False."""
        if not self.flip:
            return None
        return (hashed(self.seed, Purpose.FLIP, self.counters(step)) >> np.uint64(63)).astype(np.bool_)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the samples (B, C, H, W) and labels (B,) of this rank in a step, which is any non-negative number."""
        self._read_ahead(step)
        indices, flips = self._samples(step)
        return self.dataset.batch(indices, flips)

    def _samples(self, step: int) -> tuple[list[int], list[bool] | None]:
        """Return indices and flips of this rank's samples in a step, as `Dataset.fetch` takes them."""
        flips = self.flips(step)
        return self.indices(step).tolist(), None if flips is None else flips.tolist()

    def _read_ahead(self, step: int) -> None:
        """Let remote data come that this process reads after a step; of several, each begins with another part."""
        worker = torch.utils.data.get_worker_info()
        count, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        share = (self.rank * count + number) / (self.world * count)
        self.dataset.read_ahead(lambda: self._samples(step + count), share)

    def epoch(self, step: int) -> float:
        """Return the number of epochs, with a fraction, that all ranks together have seen before a step."""
        return step * self.batch_size * self.world / len(self.dataset)

    def loader(self, start: int, stop: int, workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of steps start .. stop - 1, in order.

        Args:
            start: first step.
            stop: step after the last one.
            workers: number of processes that prepare batches; 0 prepares them in this process. The batches do not
                depend on it.

        Raises:
            TokdynError: a sample cannot be read, in whichever process, or a process has ended.
        """
        # Starting a loader draws a random number, which must not come from torch's global generator.
        generator = torch.Generator().manual_seed(self.seed & (2**63 - 1))
        return load_in_order(self, range(start, stop), workers, generator, pin_memory=torch.cuda.is_available())

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """Return the order of the samples (n,) in an epoch; the orders of the last two epochs are cached."""
        if epoch not in self._orders:
            while len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = permutation(self.seed, epoch, len(self.dataset))
        return self._orders[epoch]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_orders": {}}
