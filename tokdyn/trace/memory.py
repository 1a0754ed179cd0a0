"""What a cache remembers from call to call: for each guidance branch the last indicator, its change and the effects."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokdyn.tokens import Routing
from tokdyn.trace.effects import Effect
from tokdyn.trace.trajectory import MOST_BRANCHES, Position


@dataclass
class BranchMemory:
    """What is remembered of one guidance branch.

    Attributes:
        images: for each sample an identifier of its image and conditioning; a sample whose identifier has changed is
            computed.
        indicator: (B, ...) the indicator of the previous step.
        total: (B,) the change of the indicator, accumulated since the last computed step.
        effects: the effect of the blocks on each stream, by its number; 0 is that of the image tokens.
        routing: the latest routing of a DC-DiT; None for other models.
    """

    images: tuple[Hashable, ...]
    indicator: Tensor
    total: Tensor
    effects: dict[int, Effect] = field(default_factory=dict)
    routing: Routing | None = None


@dataclass
class Memory:
    """What is remembered of the current trajectory.

    Attributes:
        trajectory: number of the trajectory.
        branches: the memory of each guidance branch; the one that was written last is at the end.
    """

    trajectory: int = -1
    branches: OrderedDict[Hashable, BranchMemory] = field(default_factory=OrderedDict)

    def __reduce__(self) -> Any:
        return Memory, ()  # a copy of a model begins its own trajectory

    def clear(self) -> None:
        """Forget the trajectory."""
        self.branches.clear()

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
        if position.trajectory != self.trajectory:
            self.clear()
            self.trajectory = position.trajectory
        branch = self.branches.get(position.branch)
        return branch if branch is not None and branch.indicator.shape == shape else None

    def put(self, position: Position, branch: BranchMemory) -> None:
        """Store the memory of the branch that a call belongs to; of too many branches, forget the oldest."""
        self.branches[position.branch] = branch
        while len(self.branches) > MOST_BRANCHES:
            self.branches.popitem(last=False)
