"""The handlers of FeatureCache: skip the blocks in some steps, and add the effect that they had in an earlier step.

The effect of blocks is their output minus their input. A step is cached if the settings list it, or if the accumulated
change of a tensor, the indicator, since the last computed step is below a threshold. Each guidance branch has a memory
of its own.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokdyn.adapters.coupling import coupled_parts, together
from tokdyn.attach.context import CallContext, is_offloaded
from tokdyn.attach.handlers.base import BlockCall, Bracket, Frame, Plan, handles
from tokdyn.attach.view import TokenView
from tokdyn.methods import FeatureCache
from tokdyn.ops.caching import accumulate, extrapolate, relative_change, rescale
from tokdyn.tokens import Routing
from tokdyn.trace.trajectory import MOST_BRANCHES, Position


@dataclass
class BranchMemory:
    """What is remembered of one guidance branch.

    Attributes:
        images: for each sample an identifier of its image and conditioning; a sample whose identifier has changed is
            computed.
        indicator: (B, ...) the indicator of the previous step.
        total: (B,) the change of the indicator, accumulated since the last computed step.
        effect: (B, N, D) the effect of the blocks when each sample was last computed; None before the first time.
        level: (B,) the noise level at which that was.
        before: effect and noise level of the computed step before that one; None unless effects are extrapolated.
        routing: the latest routing of a DC-DiT; None for other models.
    """

    images: tuple[Hashable, ...]
    indicator: Tensor
    total: Tensor
    effect: Tensor | None = None
    level: Tensor | None = None
    before: tuple[Tensor, Tensor] | None = None
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
        return Memory(self.trajectory, OrderedDict((key, replace(branch)) for key, branch in self.branches.items()))

    def get(self, context: CallContext, shape: torch.Size) -> BranchMemory | None:
        """Return the memory of the branch that a call belongs to, after forgetting an earlier trajectory.

        Args:
            context: the call of the model.
            shape: shape of the indicator.

        Returns:
            The memory; None at the first step of the branch, or if its indicator had another shape.
        """
        position = context.position
        if position.trajectory != self.trajectory:
            self.clear()
            self.trajectory = position.trajectory
        branch = self.branches.get(position.branch)
        return branch if branch is not None and branch.indicator.shape == shape else None

    def put(self, context: CallContext, branch: BranchMemory) -> None:
        """Store the memory of the branch that a call belongs to; of too many branches, forget the oldest."""
        self.branches[context.position.branch] = branch
        while len(self.branches) > MOST_BRANCHES:
            self.branches.popitem(last=False)


@dataclass
class Reuse:
    """The state between the first and the last block.

    Attributes:
        start: (B, N, D) the tokens before the blocks.
        reused: for each sample, whether its blocks are skipped and the remembered effect is added.
        fresh: for each sample, whether another image or conditioning is remembered, or none.
        branch: the memory of the branch.
        view: the view of `start`.
    """

    start: Tensor
    reused: Sequence[bool]
    fresh: Sequence[bool]
    branch: BranchMemory
    view: TokenView


@dataclass(eq=False)
class CachedBlocks(Bracket):
    """Decides for each sample whether it skips the blocks `first` to `last`, and adds the remembered effect if so.

    With `indicator="first_block"` it opens after the first block, whose effect `FirstBlock` puts into its slot.

    Attributes:
        method: the settings.
        slot: slot of the state: a `Reuse` between the first and the last block.
        memory: what is remembered from call to call.
    """

    method: FeatureCache
    first: int
    last: int
    slot: int
    memory: Memory = field(default_factory=Memory)

    @property
    def never(self) -> bool:
        """Whether the settings let no step be cached, so that the handler has no effect."""
        return self.method.steps is None and not self.method.compares

    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall | None) -> tuple[Tensor, TokenView]:
        """Decide for every sample whether it is reused, and mark reused ones as idle, so that the blocks skip them.

        `block` is None for a DC-DiT, whose own chunking calls this.
        """
        context = frame.context
        if context.training or self.never:
            return x, view
        indicator, position = self.indicator(context, x, block), context.position
        branch = self.memory.get(context, indicator.shape)
        if branch is None:
            branch = BranchMemory(position.images, indicator, torch.zeros(len(x), device=x.device))
            fresh, reused = [True] * len(x), [False] * len(x)
        else:
            fresh = [now != before for now, before in zip(position.images, branch.images, strict=True)]
            reused = self._together(context, branch, self._decide(branch, indicator, position, fresh))
            branch.images, branch.indicator = position.images, indicator
        self.memory.put(context, branch)
        context.slots[self.slot] = Reuse(x, reused, fresh, branch, view)
        idle = frozenset(sample for sample, reuse in enumerate(reused) if reuse)
        context.trace.cached = idle
        return x, view.with_idle(idle)

    def indicator(self, context: CallContext, x: Tensor, block: BlockCall | None) -> Tensor:
        """Compute the indicator (B, ...) that is compared from step to step.

        If the settings list the computed steps, only the shape of the indicator matters, and it is x itself.
        """
        if self.method.indicator == "first_block":
            return context.slots[self.slot]  # type: ignore[no-any-return]
        modulated = None if block is None else block.site.blocks.modulated
        if modulated is None or block is None or self.method.steps is not None:
            return x.detach()
        context.trace.compared = len(x)
        if not is_offloaded(block.module):
            return modulated(block.module, block.named).detach()
        with context.residency.present(block.module):
            return modulated(block.module, block.named).detach()

    def _decide(self, branch: BranchMemory, indicator: Tensor, position: Position, fresh: Sequence[bool]) -> list[bool]:
        """Decide for each sample whether it is reused, and update the accumulated change of the branch.

        Args:
            branch: the memory of the branch; `total` is updated.
            indicator: (B, ...) the indicator of this step.
            position: the place of the call.
            fresh: for each sample, whether another image is remembered; such a sample is computed.
        """
        steps, count = position.steps, self.method.num_steps
        if position.num_steps is not None and (count is not None or self.method.steps is None):
            count = position.num_steps  # what the loop says goes before what was set
        last = [count is not None and step >= count - 1 for step in steps]
        if self.method.steps is not None:
            computed = [step in self.method.steps for step in steps]
            return [not any(reasons) for reasons in zip(computed, last, fresh, strict=True)]
        change = rescale(relative_change(indicator, branch.indicator), self.method.coefficients)
        forced = [one or other for one, other in zip(last, fresh, strict=True)]
        if any(forced):  # NaN is not below any threshold
            change = change.masked_fill(torch.tensor(forced, device=change.device), math.nan)
        reuse, branch.total = accumulate(branch.total, change, self.method.threshold)
        decided: list[bool] = reuse.tolist()
        return decided

    @staticmethod
    def _together(context: CallContext, branch: BranchMemory, reused: list[bool]) -> list[bool]:
        """Reuse samples that attention couples only together; what is computed has accumulated nothing."""
        if not all(reused) and any(reused):
            reused = together(reused, coupled_parts(context.model))
            branch.total = torch.where(torch.tensor(reused, device=branch.total.device), branch.total, 0.0)
        return reused

    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """Add the remembered effect to samples that are reused, and remember the new effect of the others."""
        context, state = frame.context, frame.context.slots[self.slot]
        if not isinstance(state, Reuse):
            return x, view
        context.slots[self.slot] = None
        start, reused, branch = state.start, state.reused, state.branch
        if all(reused) and not self.method.extrapolate:
            assert branch.effect is not None
            return start + branch.effect, state.view
        level = torch.tensor(context.levels(state.view), device=x.device)
        if branch.effect is None:
            branch.effect, branch.level = (x - start).detach(), level
            return x, state.view
        assert branch.level is not None
        if all(reused):
            return start + self._effect(branch, level), state.view
        self._remember(branch, x, level, state)
        if not any(reused):
            return x, state.view
        chosen = torch.tensor(reused, device=x.device).view(-1, 1, 1)
        return torch.where(chosen, start + self._effect(branch, level), x), state.view

    def _remember(self, branch: BranchMemory, x: Tensor, level: Tensor, state: Reuse) -> None:
        """Remember the effects of the samples that were computed, x - start, at these noise levels (B,)."""
        assert branch.effect is not None
        assert branch.level is not None
        effect, when, fresh = (x - state.start).detach(), level, torch.tensor(state.fresh, device=x.device)
        before = branch.effect, branch.level
        if any(state.reused):
            kept = torch.tensor(state.reused, device=x.device)
            wide, earlier = kept.view(-1, 1, 1), branch.before or before
            before = torch.where(wide, earlier[0], before[0]), torch.where(kept, earlier[1], before[1])
            effect, when = torch.where(wide, branch.effect, effect), torch.where(kept, branch.level, level)
        branch.effect, branch.level = effect, when
        # a fresh sample has no earlier step: equal levels are not extrapolated
        branch.before = (before[0], torch.where(fresh, when, before[1])) if self.method.extrapolate else None

    def _effect(self, branch: BranchMemory, level: Tensor) -> Tensor:
        """Return the remembered effect (B, N, D), extrapolated to these noise levels (B,) if the settings say so."""
        assert branch.effect is not None
        assert branch.level is not None
        if not self.method.extrapolate or branch.before is None:
            return branch.effect
        earlier, when = branch.before
        length = (branch.level - when).view(-1, 1, 1)
        steps = (level.view(-1, 1, 1) - branch.level.view(-1, 1, 1)) / length
        return torch.where(length == 0, branch.effect, extrapolate(branch.effect, earlier, steps)).to(branch.effect)


@dataclass(eq=False)
class FirstBlock(Bracket):
    """A bracket around the first block alone; the effect of this block is the indicator of a cache.

    Attributes:
        cache: the cache, which opens after the first block.
        slot: slot of the tokens before the block.
        compared: whether the values of the indicator matter, and not only its shape.
    """

    cache: CachedBlocks
    slot: int
    compared: bool = True
    first: int = 0
    last: int = 0

    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall | None) -> tuple[Tensor, TokenView]:
        """Keep the tokens that the block gets, if the indicator is compared."""
        frame.context.slots[self.slot] = x if self.compared else None
        return x, view

    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """Put the effect of the block, or a tensor of its shape, into the slot of the cache."""
        slots = frame.context.slots
        slots[self.cache.slot] = (x - slots[self.slot] if self.compared else x).detach()
        slots[self.slot] = None
        return x, view


@handles(FeatureCache)
def build(plan: Plan) -> Sequence[object]:
    """Build the cache; if the first block is the indicator, also the bracket around that block."""
    method: FeatureCache = plan.method
    last = plan.sizes.depth - 1
    if method.indicator == "first_block":
        cache = CachedBlocks(method, 1, last, plan.slot + 1)
        return [FirstBlock(cache, plan.slot, method.compares), cache]
    return [CachedBlocks(method, 0, last, plan.slot)]
