"""What a cache remembers from call to call: for each guidance branch what its rule compares, and the effects."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from tokdyn.ops.easycache import transformation_rate
from tokdyn.tokens import Routing
from tokdyn.trace.effects import Effect
from tokdyn.trace.trajectory import MOST_BRANCHES, Position

Branch = TypeVar("Branch")


@dataclass(frozen=True)
class Accumulated:
    """What has accumulated for each sample since its last computed step.

    Attributes:
        total: (B,) what the rule of the cache accumulates and compares with the threshold.
        product: (B,) the product of the ratios that MagCache multiplies; 1 in other caches.
        reused: for each sample, its cached steps in a row.
    """

    total: Tensor
    product: Tensor
    reused: tuple[int, ...]

    @classmethod
    def nothing(cls, batch: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Accumulated:
        """Return what a step begins with before which all samples were computed."""
        zeros = torch.zeros(batch, device=device, dtype=dtype)
        return cls(zeros, torch.ones_like(zeros), (0,) * batch)

    def kept(self, reused: Sequence[bool]) -> Accumulated:
        """Return what a step leaves in which these samples (B) are reused: nothing of those that are computed."""
        if all(reused):
            return self
        kept = torch.tensor(reused, device=self.total.device)
        row = tuple(number if reuse else 0 for number, reuse in zip(self.reused, reused, strict=True))
        return Accumulated(torch.where(kept, self.total, 0.0), torch.where(kept, self.product, 1.0), row)


@dataclass(frozen=True)
class LastComputed:
    """The model in the last computed step of each sample, as EasyCache sees it.

    Attributes:
        input: (B, ...) the input of the model.
        output: (B, ...) what the model predicted.
        rate: (B,) how much the output changed for each change of the input, since the computed step before; NaN until
            two steps of an image were computed.
    """

    input: Tensor
    output: Tensor
    rate: Tensor

    def updated(self, x: Tensor, output: Tensor, kept: Sequence[bool], fresh: Sequence[bool]) -> LastComputed:
        """Return the state after a step.

        Args:
            x: (B, ...) the input of this step.
            output: (B, ...) what the model predicted.
            kept: for each sample, whether this step was cached, so that nothing changes for it.
            fresh: for each sample, whether another image was remembered, or none.
        """
        rate = transformation_rate(output, self.output, x, self.input)
        rate = torch.where(torch.tensor(fresh, device=rate.device), math.nan, rate)
        if not any(kept):
            return LastComputed(x, output, rate)
        keep = torch.tensor(kept, device=rate.device)
        x, output = (
            torch.where(keep.view(-1, *[1] * (now.dim() - 1)), before, now)
            for now, before in ((x, self.input), (output, self.output))
        )
        return LastComputed(x, output, torch.where(keep, self.rate, rate))


@dataclass
class BranchMemory:
    """What is remembered of one guidance branch.

    Attributes:
        images: for each sample an identifier of its image and conditioning; a sample whose identifier has changed is
            computed.
        shape: shape of the indicator.
        since: what has accumulated since the last computed step.
        indicator: (B, ...) the indicator of the previous step; None if the rule compares none.
        effects: the effect of the blocks on each stream, by its number; 0 is that of the image tokens.
        routing: the latest routing of a DC-DiT; None for other models.
        last: the model in the last computed step; None in caches that do not compare what it predicts.
        awaited: during a call, for each sample whether it is reused and whether it is fresh, until it is known what the
            model predicts; None otherwise.
    """

    images: tuple[Hashable, ...]
    shape: torch.Size
    since: Accumulated
    indicator: Tensor | None = None
    effects: dict[int, Effect] = field(default_factory=dict)
    routing: Routing | None = None
    last: LastComputed | None = None
    awaited: tuple[Sequence[bool], Sequence[bool]] | None = None

    def note(self, output: Tensor) -> None:
        """Note what the model predicted (B, ...) in the call that is awaited, if any."""
        if self.awaited is None:
            return
        (reused, fresh), self.awaited = self.awaited, None
        assert self.indicator is not None, "the input of the model, which the rule compares"
        if self.last is None or self.last.output.shape != output.shape:
            self.last = LastComputed(self.indicator, output, torch.full((len(output),), math.nan, device=output.device))
        else:
            self.last = self.last.updated(self.indicator, output, reused, fresh)


@dataclass
class TrajectoryMemory(Generic[Branch]):
    """What is remembered of the current trajectory.

    Attributes:
        trajectory: number of the trajectory.
        branches: what is remembered of each guidance branch; the one that was written last is at the end.
    """

    trajectory: int = -1
    branches: OrderedDict[Hashable, Branch] = field(default_factory=OrderedDict)

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy of a model begins its own trajectory

    def clear(self) -> None:
        """Forget the trajectory."""
        self.branches.clear()

    def enter(self, position: Position) -> None:
        """Forget an earlier trajectory than that of a call."""
        if position.trajectory != self.trajectory:
            self.clear()
            self.trajectory = position.trajectory

    def put(self, position: Position, branch: Branch) -> None:
        """Store what is remembered of the branch that a call belongs to; of too many branches, forget the oldest."""
        self.branches[position.branch] = branch
        self.branches.move_to_end(position.branch)
        while len(self.branches) > MOST_BRANCHES:
            self.branches.popitem(last=False)


class Memory(TrajectoryMemory[BranchMemory]):
    """What a cache remembers of the current trajectory."""

    @property
    def latest(self) -> BranchMemory | None:
        """The memory of the branch that was written last; None before the first."""
        return next(reversed(self.branches.values()), None)

    def fork(self) -> Memory:
        """Return a copy that can be changed without an effect on this memory. Tensors are shared."""
        copies = ((key, replace(branch, effects=dict(branch.effects))) for key, branch in self.branches.items())
        return Memory(self.trajectory, OrderedDict(copies))

    def get(self, position: Position, shape: torch.Size) -> BranchMemory | None:
        """Return the memory of the branch that a call belongs to, after forgetting an earlier trajectory.

        Args:
            position: of the call.
            shape: shape of the indicator.

        Returns:
            The memory; None at the first step of the branch, or if its indicator had another shape.
        """
        self.enter(position)
        branch = self.branches.get(position.branch)
        return branch if branch is not None and branch.shape == shape else None
