"""FeatureCache at work: when hardly anything has changed, blocks are passed by and their last effect is repeated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokdyn.attach.run import Run
from tokdyn.methods import FeatureCache
from tokdyn.ops.caching import accumulate, extrapolate, relative_change, rescale
from tokdyn.tokens import Routing
from tokdyn.trace.trajectory import Turn


@dataclass
class Branch:
    """What is remembered of one guidance branch.

    Attributes:
        seen: (B, ...) indicator of the step before.
        total: (B,) accumulated change.
        effect: (B, N, D) what the blocks added when they last ran, for each sample.
        level: (B,) the noise level at which that was.
        before: effect and level of the time before that.
    """

    seen: Tensor
    total: Tensor
    effect: Tensor | None = None
    level: Tensor | None = None
    before: tuple[Tensor, Tensor] | None = None


@dataclass
class Memory:
    """The branches of the trajectory that is being sampled, by the name or place of each.

    Attributes:
        trajectory: its number.
        branches: what is remembered of each.
        routing: what the router of a model that chunks its tokens itself decided last.
    """

    trajectory: int = -1
    branches: dict[str | int, Branch] = field(default_factory=dict)
    routing: dict[str | int, Routing] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget the trajectory."""
        self.branches, self.routing = {}, {}

    def of(self, turn: Turn, shape: torch.Size) -> Branch | None:
        """What is known of this branch; None if this is its first step, or its shape is another now."""
        if turn.trajectory != self.trajectory:
            self.clear()
            self.trajectory = turn.trajectory
        found = self.branches.get(turn.branch)
        return found if found is not None and found.seen.shape == shape else None


@dataclass
class Cache:
    """A bracket around the blocks that may be passed by.

    With the first block as indicator it starts behind that block, and `FirstBlock` tells it what the block did.
    """

    method: FeatureCache
    first: int
    last: int
    memory: Memory = field(default_factory=Memory)

    @property
    def never(self) -> bool:
        """No step is ever reused."""
        return self.method.steps is None and not self.method.compares

    def open(self, run: Run, x: Tensor) -> Tensor:
        """Decide for every sample whether it reuses; blocks pass through the tokens of those that do."""
        if run.training or self.never:
            return x
        indicator = self._indicator(run, x)
        branch = self.memory.of(run.turn, indicator.shape)
        if branch is None:
            branch = Branch(indicator, torch.zeros(len(x), device=x.device))
            self.memory.branches[run.turn.branch] = branch
            reused = [False] * len(x)
        else:
            reused = self._decide(branch, indicator, run.turn.step)
            branch.seen = indicator
        run.reused = frozenset(i for i, reuse in enumerate(reused) if reuse)
        run.record.reused = run.reused
        run.kept[id(self)] = (x, reused, branch)
        return x

    def _indicator(self, run: Run, x: Tensor) -> Tensor:
        if self.method.indicator == "first_block":
            done: Tensor = run.kept.pop("first block")
            return done
        modulated = run.stack.modulated
        if modulated is None or self.method.steps is not None:  # of steps that are set only the shape is compared
            return x.detach()
        run.record.compared = len(x)
        with run.weights.present(run.part):
            return modulated(run.part, run.named).detach()

    def _decide(self, branch: Branch, indicator: Tensor, step: int) -> list[bool]:
        """Whether each sample reuses; the accumulated change goes on."""
        last = self.method.num_steps is not None and step >= self.method.num_steps - 1
        if self.method.steps is not None:
            return [not (step in self.method.steps or last)] * len(indicator)
        change = rescale(relative_change(indicator, branch.seen), self.method.coefficients)
        reuse, branch.total = accumulate(branch.total, change, math.nan if last else self.method.threshold)
        decided: list[bool] = reuse.tolist()
        return decided

    def close(self, run: Run, x: Tensor) -> Tensor:
        """Add the remembered effect where it is reused, remember the new one elsewhere."""
        if id(self) not in run.kept:
            return x
        start, reused, branch = run.kept.pop(id(self))
        run.reused = frozenset()
        if all(reused) and not self.method.extrapolate:
            again: Tensor = start + branch.effect
            return again
        level = torch.tensor(run.level, device=x.device)
        if branch.effect is None:
            branch.effect, branch.level = (x - start).detach(), level
            return x
        assert branch.level is not None
        if all(reused):
            repeated: Tensor = start + self._effect(branch, level)
            return repeated
        if any(reused):
            chosen = torch.tensor(reused, device=x.device)
            wide = chosen.view(-1, 1, 1)
            out = torch.where(wide, start + self._effect(branch, level), x)
            effect = torch.where(wide, branch.effect, (x - start).detach())
            when = torch.where(chosen, branch.level, level)
            earlier = branch.before or (branch.effect, branch.level)
            before = torch.where(wide, earlier[0], branch.effect), torch.where(chosen, earlier[1], branch.level)
        else:
            out, effect, when, before = x, (x - start).detach(), level, (branch.effect, branch.level)
        branch.effect, branch.level = effect, when
        branch.before = before if self.method.extrapolate else None
        return out

    def _effect(self, branch: Branch, level: Tensor) -> Tensor:
        """The remembered effect, or its continuation to this noise level."""
        assert branch.effect is not None
        assert branch.level is not None
        if not self.method.extrapolate or branch.before is None:
            return branch.effect
        earlier, when = branch.before
        length = (branch.level - when).view(-1, 1, 1)
        steps = (level.view(-1, 1, 1) - branch.level.view(-1, 1, 1)) / length
        return torch.where(length == 0, branch.effect, extrapolate(branch.effect, earlier, steps)).to(branch.effect)


@dataclass(frozen=True)
class FirstBlock:
    """A bracket around the first block alone: what it added is the indicator.

    Attributes:
        compared: somebody looks at its values, and not only at its shape.
    """

    compared: bool = True
    first: int = 0
    last: int = 0

    def open(self, run: Run, x: Tensor) -> Tensor:
        """Remember what the block gets."""
        if self.compared:
            run.kept[id(self)] = x
        return x

    def close(self, run: Run, x: Tensor) -> Tensor:
        """Tell the cache what the block did."""
        run.kept["first block"] = (x - run.kept.pop(id(self)) if self.compared else x).detach()
        return x
