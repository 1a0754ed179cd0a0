"""Keep an exponential moving average (EMA) of the weights, as a second model that can be sampled and saved."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.train.schedule import ema_decay
from tokdyn.train.sharding import local


class Ema:
    """The averaged model: `average = d * average + (1 - d) * weight` for every trainable parameter.

    Buffers are copied at every update. Frozen parameters are copied once, when this object is made.

    Args:
        model: The model whose weights are averaged. The average starts as a deep copy of it, in evaluation mode and
            without gradients.
        decay: The final decay d.
        warmup: Whether d rises to its final value, see `tokdyn.train.schedule.ema_decay`.

    Attributes:
        model: The averaged model.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool) -> None:
        self.model: Any = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.warmup = warmup
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """Average the weights of a model from now on: of the same one, after both have been sharded."""
        followed = dict(model.named_parameters())
        copies = dict(self.model.named_parameters())
        averaged = [name for name, parameter in followed.items() if parameter.requires_grad]
        self._weights: list[Tensor] = [followed[name] for name in averaged]
        self._averages: list[Tensor] = [copies[name] for name in averaged]
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights, after an optimizer step.

        Args:
            step: Updates made before this one.
        """
        weight = 1.0 - ema_decay(self.decay, self.warmup, step)
        averages, weights = ([local(each) for each in group] for group in (self._averages, self._weights))
        torch._foreach_lerp_(averages, weights, weight)
        for target, source in self._buffers:
            target.copy_(source)
