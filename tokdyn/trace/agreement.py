"""Processes that compute together and must decide alike which steps are cached, or they wait for each other forever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tokdyn.errors import InputError

_ROOM = 62  # decisions that are exchanged at once, whatever the batch, beside its size


@dataclass(frozen=True)
class Ranks:
    """The processes beside which a call is made.

    Attributes:
        tokens: group of the processes that hold a part of each sample's tokens (context parallelism); None if this
            process holds all.
        others: group of further processes that must decide alike, such as those of the other guidance branches; None if
            there are none. Their calls must hold the same number of samples.
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

        The first message has one size for every batch and holds that of the batch, so that processes whose batches
        differ all notice it.

        Args:
            decided: the decisions of this process.
            device: of the call, on which the processes exchange them.

        Raises:
            InputError: the processes have batches of different sizes.
        """
        groups = [group for group in (self.tokens, self.others) if group is not None]
        if not groups:
            return list(decided)
        first, rest, count = list(map(int, decided[:_ROOM])), list(map(int, decided[_ROOM:])), len(decided)
        fewest, most, *agreed = _least([count, -count, *first, *[1] * (_ROOM - len(first))], groups, device)
        if fewest != -most:
            raise InputError(
                f"processes that agree on cached steps (tokdyn.agree) have batches of {fewest} to {-most} samples; "
                "call the model with equally many in all of them, or call tokdyn.agree with a group that does."
            )
        return [*map(bool, agreed[: len(first)]), *map(bool, _least(rest, groups, device) if rest else ())]

    def part(self, x: Tensor) -> Tensor:
        """Return the tokens (B, n, D) of all tokens (B, N, D) that this process holds."""
        if self.tokens is None:
            return x
        return x.tensor_split(dist.get_world_size(self.tokens), 1)[dist.get_rank(self.tokens)]


def _least(values: Sequence[int], groups: Sequence[Any], device: torch.device) -> list[int]:
    """Return the least of each value among all processes of the groups."""
    message = torch.tensor(values, dtype=torch.int32, device=device)
    for group in groups:
        dist.all_reduce(message, dist.ReduceOp.MIN, group=group)
    least: list[int] = message.tolist()
    return least


@dataclass(frozen=True)
class Agreement:
    """A group of processes in the settings of a model; copies of the model belong to it, and files do not hold it."""

    group: Any

    def __deepcopy__(self, memo: Any) -> Agreement:
        return self

    def __reduce__(self) -> Any:
        return Agreement, (None,)
