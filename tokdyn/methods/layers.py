"""Layers that compute in the dtype of their input, whatever the dtype of their weights.

With them routers and residual projections compute in fp32 in a bf16 model too. They are modules that are called in the
usual way, so that hooks on them run: those of offloading, LoRA and FLOP counters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.ops.precision import full_convolutions


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., D) to (..., E)."""
        return F.linear(input, self.weight.to(input), _like(self.bias, input))


class Conv2d(nn.Conv2d):
    """A convolution that computes in the dtype of its input; fp32 is computed without TF32."""

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, inputs, rows, columns) to (B, outputs, rows, columns)."""
        with full_convolutions(input.device):
            out: Tensor = self._conv_forward(input, self.weight.to(input), _like(self.bias, input))
            return out


class GroupNorm(nn.GroupNorm):
    """Group normalisation that computes in the dtype of its input; a group of a single value becomes the bias."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, ...)."""
        weight, bias = _like(self.weight, input), _like(self.bias, input)
        return torch.group_norm(input, self.num_groups, weight, bias, self.eps)  # F.group_norm refuses single values


def _like(value: Tensor | None, x: Tensor) -> Tensor | None:
    return None if value is None else value.to(x)
