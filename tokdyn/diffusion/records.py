"""What a sampling run tells about itself, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokdyn.diffusion.objective import Objective


@dataclass(frozen=True)
class StepState:
    """What a callback sees, after the model has spoken and before the scheduler moves on.

    Attributes:
        index: step, counted from 0.
        timestep: (B,) what the model was told, on the model's device.
        level: noise level in [0, 1].
        x: (B, C, H, W) noisy images.
        prediction: (B, C, H, W) guided and clipped.
        routing: the model's routing, conditional branch first, or None.
        objective: what the model was trained with.
    """

    index: int
    timestep: Tensor
    level: float
    x: Tensor
    prediction: Tensor
    routing: Any
    objective: Objective

    def x0(self) -> Tensor:
        """(B, C, H, W) the clean images predicted at this step."""
        return self.objective.predict_x0(self.prediction, self.x, self.timestep)

    def keep(self) -> Tensor | None:
        """(B, N) bool, the tokens kept in the conditional branch; None for models that compute every token."""
        return None if self.routing is None else self.routing.keep[: len(self.x)]


@dataclass(frozen=True)
class KeptCounts:
    """Tokens that one step kept.

    Attributes:
        tokens: N, tokens of an image before any is dropped.
        cond: (B,) int64, kept in the conditional branch.
        uncond: (B,) int64, kept in the unconditional branch; None when it was not computed.
    """

    tokens: int
    cond: Tensor
    uncond: Tensor | None

    def fraction(self) -> float:
        """Kept tokens over all tokens, both branches together."""
        both = self.cond if self.uncond is None else torch.cat([self.cond, self.uncond])
        return float(both.double().mean()) / self.tokens


@dataclass(frozen=True)
class StepRecord:
    """What one step cost.

    Attributes:
        index: step, counted from 0.
        timestep: what the model was told.
        level: noise level in [0, 1].
        guided: whether the unconditional branch was computed.
        seconds: wall time of the step, the whole batch together.
        counts: tokens kept, or None for models that compute every token.
    """

    index: int
    timestep: float
    level: float
    guided: bool
    seconds: float
    counts: KeptCounts | None


@dataclass(frozen=True)
class Generation:
    """The result of :func:`tokdyn.diffusion.sampling.generate`.

    Attributes:
        images: (B, C, H, W) float32, on the model's device.
        steps: one record per step.
    """

    images: Tensor
    steps: list[StepRecord]


class KeptLedger:
    """Collects the kept counts of every step on the device and moves them to the host once, at the end."""

    def __init__(self) -> None:
        self._counts: list[Tensor] = []
        self._tokens = 0

    def add(self, routing: Any) -> None:
        """Note the counts of one step; None for a model without routing. The masks are not held."""
        if routing is not None:
            self._counts.append(routing.kept)
            self._tokens = routing.keep.shape[1]

    def split(self, guided: list[bool], batch: int) -> list[KeptCounts | None]:
        """The counts of every step, split into branches of ``batch`` images; None at each step without routing."""
        if not self._counts:
            return [None] * len(guided)
        branches = iter(torch.cat(self._counts).cpu().view(-1, batch))
        return [KeptCounts(self._tokens, next(branches), next(branches) if both else None) for both in guided]
