"""Processes that compute together and must decide alike which steps are cached, or they wait for each other forever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The processes beside which a call is made.

    Attributes:
        tokens: group of the processes that hold a part of each sample's tokens (context parallelism); None if this
            process holds all.
        others: group of further processes that must decide alike, such as those of the other guidance branches; None if
            there are none. Their calls hold the same number of samples.
    """

    tokens: Any = None
    others: Any = None

    def total(self, sums: Tensor) -> Tensor:
        """Add sums over a sample's tokens, of any shape, up over the processes that hold parts of them."""
        if self.tokens is None:
            return sums
        sums = sums.contiguous()
        dist.all_reduce(sums, group=self.tokens)
        return sums

    def all_of(self, decided: Sequence[bool], device: torch.device) -> list[bool]:
        """Return the decisions (B) that all processes have made; each of them has to call this.

        Args:
            decided: the decisions of this process.
            device: of the call, on which the processes exchange them.
        """
        groups = [group for group in (self.tokens, self.others) if group is not None]
        if not groups:
            return list(decided)
        votes = torch.tensor(decided, dtype=torch.uint8, device=device)
        for group in groups:
            dist.all_reduce(votes, dist.ReduceOp.MIN, group=group)
        agreed: list[bool] = votes.bool().tolist()
        return agreed

    def part(self, x: Tensor) -> Tensor:
        """Return the tokens (B, n, D) of all tokens (B, N, D) that this process holds."""
        if self.tokens is None:
            return x
        return x.tensor_split(dist.get_world_size(self.tokens), 1)[dist.get_rank(self.tokens)]


@dataclass(frozen=True)
class Agreement:
    """A group of processes in the settings of a model; copies of the model belong to it, and files do not hold it."""

    group: Any

    def __deepcopy__(self, memo: Any) -> Agreement:
        return self

    def __reduce__(self) -> Any:
        return Agreement, (None,)
