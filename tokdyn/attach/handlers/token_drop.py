"""TokenDrop at work: a random subset of the tokens sees a span of blocks, the others pass by it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokdyn.attach.run import Run
from tokdyn.methods import TokenDrop
from tokdyn.ops.dropping import kept_count, mix, put_back, subset, take


@dataclass(frozen=True)
class Dropping:
    """A bracket around the blocks `first` to `last`."""

    method: TokenDrop
    first: int
    last: int

    def open(self, run: Run, x: Tensor) -> Tensor:
        """Keep a random subset of each sample."""
        forced = run.attachment.drop_rate
        rate = self.method.rate if forced is None else forced
        if not (run.training or forced is not None) or int(x.shape[1] * rate) == 0:
            return x
        noise = torch.rand(x.shape[:2], device=x.device) if run.training else self._hash(run, x)
        lengths = run.lengths or (x.shape[1],) * len(x)
        left = tuple(kept_count(length, rate) for length in lengths)
        index = subset(noise, lengths, left)
        run.kept[id(self)] = (x, index, left, run.index, run.lengths)
        run.index = index if run.index is None else run.index.gather(1, index)
        run.lengths = left if len(set(left)) > 1 else None
        return take(x, index)

    def _hash(self, run: Run, x: Tensor) -> Tensor:
        """(B, N) numbers that depend on the noise level and the cell: sampling is repeatable, in any batch."""
        moment = torch.tensor([round(1e6 * level) for level in run.level], device=x.device)[:, None]
        place = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]) if run.index is None else run.index
        return mix(mix(moment + self.method.seed * 1_000_003) + place).double()

    def close(self, run: Run, x: Tensor) -> Tensor:
        """Put the others back as they were."""
        if id(self) not in run.kept:
            return x
        full, index, left, run.index, run.lengths = run.kept.pop(id(self))
        return put_back(x, full, index, left)
