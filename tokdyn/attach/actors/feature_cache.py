"""FeatureCache at work: when hardly anything has changed, blocks are passed by and their last effect is repeated."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokdyn.attach.run import Run
from tokdyn.methods import FeatureCache
from tokdyn.ops.caching import accumulate, extrapolate, relative_change, rescale


@dataclass
class Branch:
    """What is remembered of one guidance branch.

    Attributes:
        step: of the trajectory, from 0.
        seen: (B, ...) indicator of the step before.
        total: (B,) accumulated change.
        effect: (B, N, D) what the blocks added when they last ran, for each sample.
        level: (B,) the noise level at which that was.
        before: effect and level of the time before that.
    """

    step: int
    seen: Tensor
    total: Tensor
    effect: Tensor | None = None
    level: Tensor | None = None
    before: tuple[Tensor, Tensor] | None = None


@dataclass
class Memory:
    """The branches of the trajectory that is being sampled.

    Calls at one noise level are branches, in the order in which they come. A noise level above the last one begins a
    new trajectory.
    """

    branches: list[Branch] = field(default_factory=list)
    level: tuple[float, ...] = ()
    place: int = -1

    def clear(self) -> None:
        """Forget the trajectory."""
        self.branches, self.level, self.place = [], (), -1

    def turn(self, level: tuple[float, ...], shape: torch.Size) -> Branch | None:
        """The branch of this call, None if it is its first step."""
        if level == self.level:
            self.place += 1
        else:
            if len(level) != len(self.level) or level[0] > self.level[0]:
                self.clear()
            self.level, self.place = level, 0
        if self.place < len(self.branches) and self.branches[self.place].seen.shape == shape:
            return self.branches[self.place]
        return None

    def put(self, branch: Branch) -> None:
        """Remember a branch in the place of this call."""
        self.branches[self.place : self.place + 1] = [branch]


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
        return self.method.steps is None and not self.method.threshold > 0

    def open(self, run: Run, x: Tensor) -> Tensor:
        """Decide for every sample whether it reuses; if all do, the blocks pass everything through."""
        if run.training or self.never:
            return x
        indicator = self._indicator(run, x)
        branch = self.memory.turn(tuple(run.level), indicator.shape)
        batch = len(x)
        if branch is None:
            branch = Branch(0, indicator, torch.zeros(batch, device=x.device))
            self.memory.put(branch)
            reuse = torch.zeros(batch, dtype=torch.bool, device=x.device)
        else:
            branch.step += 1
            reuse = self._decide(branch, indicator)
            branch.seen = indicator
        run.idle = bool(reuse.all())
        run.record.cached = run.idle
        run.kept[id(self)] = (x, reuse, branch)
        return x

    def _indicator(self, run: Run, x: Tensor) -> Tensor:
        if self.method.indicator == "first_block":
            done: Tensor = run.kept.pop("first block")
            return done
        modulated = run.stack.modulated
        return (x if modulated is None else modulated(run.part, run.named)).detach()

    def _decide(self, branch: Branch, indicator: Tensor) -> Tensor:
        """(B,) bool; the accumulated change goes on."""
        last = self.method.num_steps is not None and branch.step >= self.method.num_steps - 1
        if self.method.steps is not None:
            computed = branch.step in self.method.steps
            return torch.full_like(branch.total, not (computed or last), dtype=torch.bool)
        change = rescale(relative_change(indicator, branch.seen), self.method.coefficients)
        reuse, branch.total = accumulate(branch.total, change, math.nan if last else self.method.threshold)
        return reuse

    def close(self, run: Run, x: Tensor) -> Tensor:
        """Add the remembered effect where it is reused, remember the new one elsewhere."""
        if id(self) not in run.kept:
            return x
        start, reuse, branch = run.kept.pop(id(self))
        run.idle = False
        level = torch.tensor(run.level, device=x.device)
        if branch.effect is None:
            branch.effect, branch.level = (x - start).detach(), level
            return x
        chosen = reuse.view(-1, 1, 1)
        effect = self._effect(branch, level)
        out = torch.where(chosen, start + effect, x)
        fresh = torch.where(chosen, branch.effect, (x - start).detach())
        if not reuse.all():
            earlier = (branch.effect, branch.level) if branch.before is None else branch.before
            branch.before = (
                torch.where(chosen, earlier[0], branch.effect),
                torch.where(reuse, earlier[1], branch.level),
            )
            branch.effect, branch.level = fresh, torch.where(reuse, branch.level, level)
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
    """A bracket around the first block alone: what it added is the indicator."""

    first: int = 0
    last: int = 0

    def open(self, run: Run, x: Tensor) -> Tensor:
        """Remember what the block gets."""
        run.kept[id(self)] = x
        return x

    def close(self, run: Run, x: Tensor) -> Tensor:
        """Tell the cache what the block did."""
        run.kept["first block"] = (x - run.kept.pop(id(self))).detach()
        return x
