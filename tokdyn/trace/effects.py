"""The effect of the blocks on a stream of tokens, as a cache remembers it from step to step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokdyn.ops.forecasting import DEGREE, chebyshev_weights, taylor_weights
from tokdyn.trace.storage import Storage, Stored

Forecast = Literal[0, 1, 2, "chebyshev"]
WINDOW = 10
"""Computed steps that a forecast by Chebyshev polynomials remembers."""
History = tuple[tuple[int, float], ...]
"""The computed steps of a sample, the last one first: the slot of its effect, and its noise level."""


@dataclass(frozen=True)
class Remembering:
    """What is remembered of effects, and how.

    Attributes:
        forecast: how the effect is forecast; see `FeatureCache.forecast`.
        storage: how effects are kept.
    """

    forecast: Forecast = 0
    storage: Storage = field(default_factory=Storage)

    @property
    def steps(self) -> int:
        """Largest number of computed steps of a sample whose effects are kept."""
        return WINDOW if self.forecast == "chebyshev" else self.forecast + 1

    @classmethod
    def of(cls, forecast: Forecast, dtype: str | None, device: str | None) -> Remembering:
        """Read the settings of FeatureCache: a forecast, the name of a type of torch, and "host" or None."""
        return cls(forecast, Storage(None if dtype is None else getattr(torch, dtype), device == "host"))


@dataclass(frozen=True)
class Effect:
    """The effect of the blocks on one stream of tokens, their output minus their input, in the last computed steps.

    Attributes:
        settings: what is remembered.
        slots: effects (B, N, D); a slot may hold effects of different steps for different samples.
        histories: (B) for each sample, where its effects are and at which noise levels they were computed.
        nbytes: bytes of memory.
    """

    settings: Remembering
    slots: tuple[Stored, ...] = ()
    histories: tuple[History, ...] = ()
    nbytes: int = 0

    @property
    def varies(self) -> bool:
        """Whether the forecast depends on the noise level."""
        return len(self.slots) > 1

    def updated(self, new: Tensor, levels: Sequence[float], reused: Sequence[bool], fresh: Sequence[bool]) -> Effect:
        """Return the effects after a step in which some samples were computed.

        A step at the noise level of the last computed one takes its place, as in samplers that call the model twice at
        one level.

        Args:
            new: (B, N, D) the effects in this step.
            levels: (B) the noise levels of this step.
            reused: for each sample, whether it was not computed, so that its effects stay.
            fresh: for each sample, whether another image or conditioning was remembered, or none: it starts anew.
        """
        computed = [sample for sample, skipped in enumerate(reused) if not skipped]
        histories = list(self.histories or ((),) * len(new))
        for sample in computed:
            before = () if fresh[sample] else histories[sample]
            histories[sample] = _extended(before, levels[sample], self.settings.steps)
        slots, storage = list(self.slots), self.settings.storage
        for place in sorted({histories[sample][0][0] for sample in computed}):
            rows = [not reused[sample] and histories[sample][0][0] == place for sample in range(len(new))]
            if place == len(slots):
                slots.append(storage.store(new))
            elif all(rows):
                slots[place] = storage.store(new)
            else:
                slots[place] = storage.replace(slots[place], new, torch.tensor(rows))
        return Effect(self.settings, tuple(slots), tuple(histories), sum(slot.nbytes for slot in slots))

    def at(self, levels: Sequence[float], like: Tensor) -> Tensor:
        """Forecast the effect (B, N, D) at noise levels (B), in the type and on the device of another tensor.

        Sums are computed in fp32; a repeated effect is returned as it was kept, and needs no levels.
        """
        if not self.varies:
            return self.slots[0].load(like).to(like.dtype)
        weights = self._weights(levels).to(like.device, torch.float32)
        total = torch.zeros_like(like, dtype=torch.float32)
        for weight, slot in zip(weights.unbind(1), self.slots, strict=True):
            total.addcmul_(slot.load(like).float(), weight.view(-1, 1, 1))
        return total.to(like.dtype)

    def _weights(self, levels: Sequence[float]) -> Tensor:
        """Return the weights of the slots (B, slots), fp64 on the host."""
        count, forecast = len(self.slots), self.settings.forecast
        padding = (0, math.nan)
        rows = [(*history, *(padding,) * (count - len(history))) for history in self.histories]
        nodes = torch.tensor([[level for _, level in row] for row in rows], dtype=torch.float64)
        places = torch.tensor([[slot for slot, _ in row] for row in rows])
        wanted = torch.tensor(levels, dtype=torch.float64)
        if forecast == "chebyshev":
            weights = chebyshev_weights(nodes, wanted, DEGREE)
        else:
            weights = taylor_weights(nodes, wanted, forecast)
        return torch.zeros_like(weights).scatter_add(1, places, weights)


def _extended(history: History, level: float, steps: int) -> History:
    """Return the history of a sample after another computed step; the oldest step makes room for it."""
    if history and history[0][1] == level:
        return history
    slot = len(history) if len(history) < steps else history[-1][0]
    return ((slot, level), *history)[:steps]
