"""The effect of the blocks on a stream of tokens, as a cache remembers it from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokdyn.ops.caching import extrapolate


@dataclass(frozen=True)
class Effect:
    """The effect of the blocks on one stream of tokens: their output minus their input.

    Attributes:
        latest: (B, N, D) the effect when each sample was last computed.
        level: (B,) the noise level at which that was.
        before: effect and noise level of the computed step before that one; None unless effects are extrapolated.
    """

    latest: Tensor
    level: Tensor
    before: tuple[Tensor, Tensor] | None = None

    def at(self, level: Tensor) -> Tensor:
        """Return the effect (B, N, D), extrapolated to noise levels (B,) if an earlier one is remembered."""
        if self.before is None:
            return self.latest
        earlier, when = self.before
        length = (self.level - when).view(-1, 1, 1)
        steps = (level.view(-1, 1, 1) - self.level.view(-1, 1, 1)) / length
        return torch.where(length == 0, self.latest, extrapolate(self.latest, earlier, steps)).to(self.latest)

    def updated(self, new: Tensor, level: Tensor, reused: Sequence[bool], fresh: Sequence[bool], keep: bool) -> Effect:
        """Return the effects after a step in which some samples were computed.

        Args:
            new: (B, N, D) the effects in this step.
            level: (B,) the noise levels of this step.
            reused: for each sample, whether it was not computed, so that its effect stays.
            fresh: for each sample, whether another image or conditioning was remembered, or none.
            keep: whether to remember the effects before as well.
        """
        before = self.latest, self.level
        if any(reused):
            kept = torch.tensor(reused, device=new.device)
            wide, earlier = kept.view(-1, 1, 1), self.before or before
            before = torch.where(wide, earlier[0], before[0]), torch.where(kept, earlier[1], before[1])
            new, level = torch.where(wide, self.latest, new), torch.where(kept, self.level, level)
        if not keep:
            return Effect(new, level)
        # a fresh sample has no earlier step: equal levels are not extrapolated
        first = torch.tensor(fresh, device=new.device)
        return Effect(new, level, (before[0], torch.where(first, level, before[1])))
