"""Layers that compute in the type of their input, whatever the type of their weights.

Routers and residuals are computed in fp32 also in a bf16 model. The layers are called like any other, so that what is
hung on them by others is heard: hooks that bring offloaded weights back, LoRA, counters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.ops.precision import full_convolutions


class Linear(nn.Linear):
    """A linear map of (..., D) in the type of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., D) to (..., E)."""
        return F.linear(input, self.weight.to(input), _like(self.bias, input))


class Conv2d(nn.Conv2d):
    """A convolution in the type of its input, and in full fp32 where that is the type."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to (B, E, H, W)."""
        with full_convolutions(input.device):
            out: Tensor = self._conv_forward(input, self.weight.to(input), _like(self.bias, input))
            return out


class GroupNorm(nn.GroupNorm):
    """Group normalisation in the type of its input; a group of a single value becomes the bias."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, ...) to the same."""
        weight, bias = _like(self.weight, input), _like(self.bias, input)
        return torch.group_norm(input, self.num_groups, weight, bias, self.eps)  # without the check of F.group_norm


def _like(value: Tensor | None, x: Tensor) -> Tensor | None:
    return None if value is None else value.to(x)
