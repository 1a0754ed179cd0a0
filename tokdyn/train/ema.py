"""Exponential moving average of the weights, kept as a second model that can be sampled and saved."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.train.schedule import ema_decay


class Ema:
    """The average, theta_ema <- d theta_ema + (1 - d) theta, of every trainable parameter; the rest is copied.

    Args:
        model: The model to follow. It is deep-copied; the copy needs no gradients.
        decay: d, with the warm-up of `ema_decay` when `warmup` is set.
        warmup: Let d rise to its value.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool) -> None:
        self.model: Any = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.warmup = warmup
        followed = dict(model.named_parameters())
        copies = dict(self.model.named_parameters())
        averaged = [name for name, parameter in followed.items() if parameter.requires_grad]
        self._from: list[Tensor] = [followed[name] for name in averaged]
        self._to: list[Tensor] = [copies[name] for name in averaged]
        self._buffers = list(zip(self.model.buffers(), model.buffers(), strict=True))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step.

        Args:
            step: Updates made before this one.
        """
        weight = 1.0 - ema_decay(self.decay, self.warmup, step)
        torch._foreach_lerp_(self._to, self._from, weight)
        for target, source in self._buffers:
            target.copy_(source)
