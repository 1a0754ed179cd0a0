"""Record the steps of sampling: the state that callbacks get, the numbers of kept tokens, and the time."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from tokdyn.diffusion.objective import Objective


@dataclass(frozen=True)
class StepState:
    """The state of a step, passed to a callback after the model call and before the scheduler's step.

    Attributes:
        index: index of the step, from 0.
        timestep: (B,) timesteps given to the model, on the model's device.
        level: noise level in [0, 1].
        x: (B, C, H, W) noisy images.
        prediction: (B, C, H, W) predicted noise or velocity, after guidance and clipping.
        routing: the model's routing, conditional branch first; None for models that do not route tokens.
        objective: objective that the model was trained with.
    """

    index: int
    timestep: Tensor
    level: float
    x: Tensor
    prediction: Tensor
    routing: Any
    objective: Objective

    def x0(self) -> Tensor:
        """Return the clean images (B, C, H, W) predicted at this step."""
        return self.objective.predict_x0(self.prediction, self.x, self.timestep)

    def keep(self) -> Tensor | None:
        """Return a mask (B, N) bool of the tokens kept in the conditional branch; None for models without routing."""
        return None if self.routing is None else self.routing.keep[: len(self.x)]


@dataclass(frozen=True)
class KeptCounts:
    """The numbers of tokens that were kept in one step.

    Attributes:
        tokens: N, tokens of an image before any is dropped.
        cond: (B,) int64, number of tokens kept in the conditional branch.
        uncond: (B,) int64, number of tokens kept in the unconditional branch; None if it was not computed.
    """

    tokens: int
    cond: Tensor
    uncond: Tensor | None

    def share(self) -> float:
        """Return the mean kept share over images and branches."""
        both = self.cond if self.uncond is None else torch.cat([self.cond, self.uncond])
        return float(both.double().mean()) / self.tokens


@dataclass(frozen=True)
class StepRecord:
    """The cost of one step of a batch.

    Attributes:
        index: index of the step, from 0.
        timestep: timestep given to the model.
        level: noise level in [0, 1].
        guided: whether the unconditional branch was computed.
        seconds: wall time of the step for the whole batch.
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
    """The result of `tokdyn.diffusion.sampling.generate`.

    Attributes:
        images: (B, C, H, W) float32, on the model's device.
        steps: one record per step.
    """

    images: Tensor
    steps: list[StepRecord]


class KeptLedger:
    """Collects the numbers of kept tokens of all steps on the device, and copies them to the host once, at the end."""

    def __init__(self) -> None:
        self._counts: list[Tensor] = []
        self._tokens = 0

    def add(self, routing: Any) -> None:
        """Record the numbers of one step; does nothing for a model without routing.

        Only the counts are stored, so that the masks of all steps do not stay in memory.
        """
        if routing is not None:
            self._counts.append(routing.kept)
            self._tokens = routing.keep.shape[1]

    def split(self, guided: list[bool], batch: int) -> list[KeptCounts | None]:
        """Return the numbers of kept tokens in each step.

        Args:
            guided: for each step, whether both branches were computed.
            batch: B, images per branch.

        Returns:
            One entry per step, all of them None for a model without routing.
        """
        if not self._counts:
            return [None] * len(guided)
        branches = iter(rearrange(torch.cat(self._counts).cpu(), "(branch image) -> branch image", image=batch))
        return [KeptCounts(self._tokens, next(branches), next(branches) if both else None) for both in guided]


class StepTimer:
    """Measures the time between marks without waiting for the device at each of them.

    On a CUDA device the marks are events in the stream; otherwise they are times of the host's clock.

    Args:
        device: device that runs the measured work.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Mark the end of the work enqueued so far."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._times.append(perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds between each mark and the next. Waits for the device."""
        if self._cuda:
            self._events[-1].synchronize()
            pairs = zip(self._events, self._events[1:], strict=False)
            return [start.elapsed_time(end) / 1000.0 for start, end in pairs]
        return [end - start for start, end in zip(self._times, self._times[1:], strict=False)]
