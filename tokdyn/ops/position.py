"""Sine-cosine embeddings of positions and timesteps."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.tokens import Grid


def sincos_position(grid: Grid, width: int, scale: float = 1.0) -> Tensor:
    """Compute sine-cosine embeddings of cell coordinates, as in MAE and DiT (arXiv 2212.09748).

    Each axis gets width / axes channels, the fastest axis (columns) first.

    Args:
        grid: sizes of the 1 to 3 axes.
        width: D, divisible by twice the number of axes.
        scale: difference between the coordinates of neighbouring cells. At 1/2, every second cell of a grid has the
            positions of a grid that is half as fine.

    Returns:
        (N, D) fp32, computed in fp64.

    Raises:
        InputError: the width is not divisible.
    """
    if width % (2 * len(grid)):
        raise InputError(f"width is {width}, expected a multiple of {2 * len(grid)} for the grid {grid}.")
    half = width // len(grid) // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    axes = torch.meshgrid(*(scale * torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    angles = [axis.reshape(-1, 1) * frequency for axis in reversed(axes)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


def timestep_frequencies(timestep: Tensor, width: int, shift: int = 0, period: float = 10000.0) -> Tensor:
    """Compute cosines and sines of the timestep at geometric frequencies.

    Args:
        timestep: (B,), integer or real.
        width: number of channels, even.
        shift: the last frequency is `period^(-(half - 1) / (half - shift))` with half = width / 2; 0 in DiT, and 1 in
            diffusers' DiT.
        period: longest wavelength over 2 pi, in timesteps.

    Returns:
        (B, width) fp32, cosines first.
    """
    half = width // 2
    exponent = -math.log(period) * torch.arange(half, dtype=torch.float32, device=timestep.device) / (half - shift)
    angle = timestep.float()[:, None] * torch.exp(exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
