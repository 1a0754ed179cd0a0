"""Layers that compute in the dtype of their input, whatever the dtype of their weights.

With them routers and residual projections compute in fp32 in a bf16 model too. They are modules that are called in the
usual way, so that hooks on them run: those of offloading and of FLOP counters. They are no `nn.Linear` and no
`nn.Conv2d`, because libraries that quantise a model, store its weights in eight bits or add adapters find the layers of
a model by these classes, and routers and gates have to decide in full precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.ops.precision import full_convolutions


class Linear(nn.Module):
    """A linear layer that computes in the dtype of its input; its weights are named and initialised as nn.Linear's."""

    bias: nn.Parameter  # None without a bias, as in nn.Linear

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        like = nn.Linear(in_features, out_features, bias)
        self.in_features, self.out_features = in_features, out_features
        self.weight = like.weight
        self.register_parameter("bias", like.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., D) to (..., E)."""
        return F.linear(input, self.weight.to(input), _like(self.bias, input))

    def extra_repr(self) -> str:
        """Describe the layer as nn.Linear does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Conv2d(nn.Module):
    """A convolution that computes in the dtype of its input; fp32 is computed without TF32.

    Its weights are named and initialised as nn.Conv2d's.
    """

    bias: nn.Parameter  # None without a bias

    def __init__(
        self, inputs: int, outputs: int, size: int, padding: int = 0, groups: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        like = nn.Conv2d(inputs, outputs, size, padding=padding, groups=groups, bias=bias)
        self.padding, self.groups = padding, groups
        self.weight = like.weight
        self.register_parameter("bias", like.bias)  # type: ignore[arg-type]

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, inputs, rows, columns) to (B, outputs, rows, columns)."""
        weight, bias = self.weight.to(input), _like(self.bias, input)
        with full_convolutions(input.device):
            return F.conv2d(input, weight, bias, padding=self.padding, groups=self.groups)

    def extra_repr(self) -> str:
        """Describe the shape of the weight, (outputs, inputs / groups, size, size), and the settings."""
        return f"{tuple(self.weight.shape)}, padding={self.padding}, groups={self.groups}, bias={self.bias is not None}"


class GroupNorm(nn.GroupNorm):
    """Group normalisation that computes in the dtype of its input; a group of a single value becomes the bias."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, ...)."""
        weight, bias = _like(self.weight, input), _like(self.bias, input)
        return torch.group_norm(input, self.num_groups, weight, bias, self.eps)  # F.group_norm refuses single values


def _like(value: Tensor | None, x: Tensor) -> Tensor | None:
    return None if value is None else value.to(x)
