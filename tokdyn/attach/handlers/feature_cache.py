"""FeatureCache at work: when hardly anything has changed, blocks are skipped and their remembered effect is added."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tokdyn.attach.context import CallContext, is_offloaded
from tokdyn.attach.handlers.base import BlockCall, Bracket, Frame, Plan, handles
from tokdyn.attach.view import TokenView
from tokdyn.methods import FeatureCache
from tokdyn.ops.caching import accumulate, extrapolate, relative_change, rescale
from tokdyn.tokens import Routing
from tokdyn.trace.trajectory import MOST_BRANCHES


@dataclass
class BranchMemory:
    """What is remembered of one guidance branch.

    Attributes:
        images: (B) what each sample was; a sample that is another now is computed.
        indicator: (B, ...) of the step before.
        total: (B,) accumulated change.
        effect: (B, N, D) what the blocks added when they were last computed, for each sample.
        level: (B,) the noise level at which that was.
        before: effect and level of the computed step before that, where effects are extrapolated.
        routing: what the router of DC-DiT decided last.
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
    """The guidance branches of the trajectory that a model is on.

    Attributes:
        run: number of the trajectory.
        branches: what is remembered of each, the most recent last.
    """

    run: int = -1
    branches: OrderedDict[Hashable, BranchMemory] = field(default_factory=OrderedDict)

    def __reduce__(self) -> Any:
        return Memory, ()  # a copy of a model begins its own trajectory

    def clear(self) -> None:
        """Forget the trajectory."""
        self.branches.clear()

    def fork(self) -> Memory:
        """Make a memory that goes on from here without an effect on this one."""
        return Memory(self.run, OrderedDict((key, replace(branch)) for key, branch in self.branches.items()))

    def get(self, context: CallContext, shape: torch.Size) -> BranchMemory | None:
        """Look up the branch of a call; None at its first step, or if its shape is another now."""
        position = context.position
        if position.run != self.run:
            self.clear()
            self.run = position.run
        branch = self.branches.get(position.branch)
        return branch if branch is not None and branch.indicator.shape == shape else None

    def put(self, context: CallContext, branch: BranchMemory) -> None:
        """Remember the branch of a call."""
        self.branches[context.position.branch] = branch
        while len(self.branches) > MOST_BRANCHES:
            self.branches.popitem(last=False)


@dataclass
class Reuse:
    """What was decided in a call.

    Attributes:
        start: (B, N, D) the tokens before the blocks.
        reused: (B) whether each sample adds its remembered effect.
        fresh: (B) whether each sample is another image than the one that is remembered.
        branch: the memory.
        view: that the bracket opened on.
    """

    start: Tensor
    reused: Sequence[bool]
    fresh: Sequence[bool]
    branch: BranchMemory
    view: TokenView


@dataclass(eq=False)
class CachedBlocks(Bracket):
    """A bracket around the blocks that may be skipped.

    With the first block as indicator it opens behind that block, and `FirstBlock` tells it what the block added.
    """

    method: FeatureCache
    first: int
    last: int
    slot: int
    memory: Memory = field(default_factory=Memory)

    @property
    def never(self) -> bool:
        """Whether no step is ever reused."""
        return self.method.steps is None and not self.method.compares

    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall | None) -> tuple[Tensor, TokenView]:
        """Decide for every sample whether it reuses; the blocks skip those samples."""
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
            reused = self._decide(branch, indicator, position.steps, fresh)
            branch.images, branch.indicator = position.images, indicator
        self.memory.put(context, branch)
        context.slots[self.slot] = Reuse(x, reused, fresh, branch, view)
        idle = frozenset(sample for sample, reuse in enumerate(reused) if reuse)
        context.trace.cached = idle
        return x, replace(view, idle=idle)

    def indicator(self, context: CallContext, x: Tensor, block: BlockCall | None) -> Tensor:
        """(B, ...) what is compared from step to step; of computed steps that are set, only the shape matters."""
        if self.method.indicator == "first_block":
            added: Tensor = context.slots[self.slot]
            return added
        modulated = None if block is None else block.site.blocks.modulated
        if modulated is None or block is None or self.method.steps is not None:
            return x.detach()
        context.trace.compared = len(x)
        if not is_offloaded(block.module):
            return modulated(block.module, block.named).detach()
        with context.residency.present(block.module):
            return modulated(block.module, block.named).detach()

    def _decide(
        self, branch: BranchMemory, indicator: Tensor, steps: Sequence[int], fresh: Sequence[bool]
    ) -> list[bool]:
        """Decide whether each sample reuses; the accumulated change goes on."""
        last = [self.method.num_steps is not None and step >= self.method.num_steps - 1 for step in steps]
        if self.method.steps is not None:
            computed = [step in self.method.steps for step in steps]
            return [not any(why) for why in zip(computed, last, fresh, strict=True)]
        change = rescale(relative_change(indicator, branch.indicator), self.method.coefficients)
        forced = [one or other for one, other in zip(last, fresh, strict=True)]
        if any(forced):  # not a number is below no threshold
            change = change.masked_fill(torch.tensor(forced, device=change.device), math.nan)
        reuse, branch.total = accumulate(branch.total, change, self.method.threshold)
        decided: list[bool] = reuse.tolist()
        return decided

    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """Add the remembered effect where it is reused, remember the new one elsewhere."""
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
        """Remember the effects of the samples that were computed."""
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
        # a fresh sample has no step before: equal levels are not extrapolated
        branch.before = (before[0], torch.where(fresh, when, before[1])) if self.method.extrapolate else None

    def _effect(self, branch: BranchMemory, level: Tensor) -> Tensor:
        """(B, N, D) the remembered effect, or its continuation to this noise level."""
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
    """A bracket around the first block alone: what the block adds is the indicator of a cache.

    Attributes:
        cache: that is told.
        slot: of this bracket.
        compared: whether the values of the indicator matter, and not only its shape.
    """

    cache: CachedBlocks
    slot: int
    compared: bool = True
    first: int = 0
    last: int = 0

    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall | None) -> tuple[Tensor, TokenView]:
        """Remember what the block gets."""
        frame.context.slots[self.slot] = x if self.compared else None
        return x, view

    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """Tell the cache what the block added."""
        slots = frame.context.slots
        slots[self.cache.slot] = (x - slots[self.slot] if self.compared else x).detach()
        slots[self.slot] = None
        return x, view


@handles(FeatureCache)
def build(plan: Plan) -> Sequence[object]:
    """Build the cache, behind the first block where that is the indicator."""
    method: FeatureCache = plan.method
    last = plan.sizes.depth - 1
    if method.indicator == "first_block":
        cache = CachedBlocks(method, 1, last, plan.slot + 1)
        return [FirstBlock(cache, plan.slot, method.compares), cache]
    return [CachedBlocks(method, 0, last, plan.slot)]
