"""The convolutional encoder and decoder around the blocks of DC-DiT, narrower than those (arXiv 2603.06351)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from tokdyn.ops.layers import group_norm_silu, rms_norm


class Scaffold(nn.Module):
    """Residual blocks followed by an RMSNorm: the encoder or the decoder.

    Args:
        inputs: width of the input.
        outputs: width of the output.
        depth: number of residual blocks.
        condition_width: D, width of the condition.
        change_first: whether the first block changes the width, as in the decoder, or the last, as in the encoder.
    """

    def __init__(self, inputs: int, outputs: int, depth: int, condition_width: int, change_first: bool) -> None:
        super().__init__()
        change = 0 if change_first else depth - 1
        widths = [inputs] * (change + 1) + [outputs] * (depth - change)
        self.layers = nn.ModuleList(ResidualBlock(a, b, condition_width) for a, b in pairwise(widths))
        self.norm = RMSNorm(outputs)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map x (B, inputs, R, C) and a condition (B, D) to tokens (B, R * C, outputs)."""
        x = x.contiguous(memory_format=torch.channels_last)  # in which tokens are a view of a map
        for layer in self.layers:
            x = layer(x, condition)
        tokens: Tensor = self.norm(rearrange(x, "b d r c -> b (r c) d"))
        return tokens


class ResidualBlock(nn.Module):
    """Two convolutions with GroupNorm and SiLU before each, the condition added between them, and a skip connection.

    GroupNorm has gcd(32, width) groups.

    Args:
        inputs: width of the input.
        outputs: width of the output.
        condition_width: D, width of the condition.
    """

    def __init__(self, inputs: int, outputs: int, condition_width: int) -> None:
        super().__init__()
        inner = min(inputs, outputs)
        self.norm1 = nn.GroupNorm(math.gcd(32, inputs), inputs)
        self.conv1 = nn.Conv2d(inputs, inner, 3, padding=1)
        self.cond_proj = nn.Sequential(nn.SiLU(), nn.Linear(condition_width, inner))
        self.norm2 = nn.GroupNorm(math.gcd(32, inner), inner)
        self.conv2 = nn.Conv2d(inner, outputs, 3, padding=1)
        self.skip_proj = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map x (B, inputs, R, C) and a condition (B, D) to (B, outputs, R, C)."""
        h = self.conv1(group_norm_silu(x, self.norm1))
        h = h + self.cond_proj(condition)[:, :, None, None]
        h = self.conv2(group_norm_silu(h, self.norm2))
        out: Tensor = h + (x if self.skip_proj is None else self.skip_proj(x))
        return out


class RMSNorm(nn.Module):
    """RMSNorm over the last axis, computed in the wider dtype of x and weight, which is fp32 under autocast."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return rms_norm(x, self.weight, self.eps)
