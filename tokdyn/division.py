"""Tell the code below the training loop which part of a step's batch it computes.

A step divides its batch into micro-batches of several processes. While a part is computed, it is the current one: draws
belong to the seed, the step and the place of an image in the batch, and means that losses need are those of the batch.
So the division changes results by rounding only. Outside of a training run there is no current part: torch's generator
draws, and means are those of the call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tokdyn import draws
from tokdyn.seeds import Draw


class Means(Protocol):
    """A function that averages a quantity over images of the whole batch."""

    def __call__(self, name: str, values: Tensor, group: int | None) -> Tensor:
        """Return the means of the groups that the images of this part belong to.

        Args:
            name: of the quantity, the same in all parts.
            values: (B,) of the images of this part, without gradient.
            group: consecutive images of the batch that a mean is taken over; None is all of them. The last group may
                be smaller.

        Returns:
            (B,), for each image the mean of its group.
        """


@dataclass(frozen=True)
class BatchPart:
    """The part of a training step's batch that a call of the model computes.

    Attributes:
        keys: (B,) int64 keys of its images, on the device of the model; see `tokdyn.seeds.image_keys`.
        means: averages a quantity over the whole batch.
    """

    keys: Tensor
    means: Means

    def uniform(self, samples: Sequence[int], count: int, *purpose: int) -> Tensor:
        """Draw uniform numbers (b, count) in [0, 1) for some of the images, as a method needs them.

        Args:
            samples: b positions in this part.
            count: numbers for each of them.
            *purpose: the slot of the handler that draws, and integers of its own.
        """
        keys = self.keys
        if samples != tuple(range(len(keys))):
            keys = keys.index_select(0, torch.tensor(samples, device=keys.device))
        return draws.uniform(keys, count, Draw.METHOD, *purpose)

    def over_batch(self, name: str, values: Tensor) -> Tensor:
        """Shift values (B,) so that their mean is that of the whole batch; their gradients stay as they are."""
        local = values.detach()
        return values + (self.means(name, local, None) - local.mean())


_current: BatchPart | None = None


def current() -> BatchPart | None:
    """Return the part that is being computed; None outside of a training run."""
    return _current


@contextmanager
def computing(part: BatchPart) -> Iterator[None]:
    """Make a part the current one while the context is open."""
    global _current  # not thread-local: the backward pass on an accelerator has threads of its own
    before, _current = _current, part
    try:
        yield
    finally:
        _current = before
