"""TokenDrop at work: a random subset of the tokens sees a span of blocks, the others pass by it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokdyn.attach.run import Run
from tokdyn.methods import TokenDrop
from tokdyn.ops.dropping import put_back, random_subset, take


@dataclass(frozen=True)
class Dropping:
    """A bracket around the blocks `first` to `last`."""

    method: TokenDrop
    first: int
    last: int

    def open(self, run: Run, x: Tensor) -> Tensor:
        """Keep a random subset of each sample."""
        if not run.training or int(x.shape[1] * self.method.rate) == 0:
            return x
        index = random_subset(x.shape[0], x.shape[1], self.method.rate, x.device)
        run.kept[id(self)] = (x, index, run.index)
        run.index = index if run.index is None else run.index.gather(1, index)
        return take(x, index)

    def close(self, run: Run, x: Tensor) -> Tensor:
        """Put the others back as they were."""
        if id(self) not in run.kept:
            return x
        full, index, run.index = run.kept.pop(id(self))
        return put_back(x, full, index)
