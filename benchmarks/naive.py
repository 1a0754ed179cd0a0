"""The dense formulation of DC-DiT's parts, written from the paper's equations, over all pairs of tokens.

It is only the other side of comparisons.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_dechunk(padded: Tensor, probability: Tensor, order: Tensor, real: Tensor, keep: Tensor, side: int) -> Tensor:
    """Smooth over all pairs of kept tokens with sigma 1, then find the nearest kept token of every cell among all.

    Args:
        padded: (B, M, D) kept tokens, M those of the longest sample.
        probability: (B, N).
        order: (B, M) int64, the cell of each kept token.
        real: (B, M) bool, false for padding.
        keep: (B, N) bool.
        side: rows and columns of the grid.

    Returns:
        (B, N, D).
    """
    p = probability.clamp(1e-4, 1 - 1e-4).gather(1, order)
    place = torch.stack((order // side, order % side), -1).float()
    weight = torch.exp(-squares(place, place) / 2) * p[:, None] * (real[:, None] & real[:, :, None])
    smooth = torch.bmm(weight / (weight.sum(-1, keepdim=True) + 1e-8), padded)
    mixed = p[..., None] * padded + (1 - p[..., None]) * smooth
    cell = torch.arange(keep.shape[1], device=keep.device)
    everywhere = torch.stack((cell // side, cell % side), -1).float()
    distance = squares(everywhere[None], place).masked_fill(~real[:, None], torch.inf)
    return mixed.gather(1, distance.argmin(-1)[..., None].expand(-1, -1, padded.shape[-1]))


def squares(a: Tensor, b: Tensor) -> Tensor:
    """Compute squared distances (B, n, m) between coordinates (B, n, 2) and (B, m, 2)."""
    return (a[:, :, None, 0] - b[:, None, :, 0]) ** 2 + (a[:, :, None, 1] - b[:, None, :, 1]) ** 2


def chunk_by_sorting(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Sort all cells to find the kept ones, padded: their cells (B, M) int64, and which are real, (B, M) bool."""
    counts = keep.sum(1)
    longest = int(counts.max())
    cell = torch.arange(keep.shape[1], device=keep.device)
    order = torch.argsort(torch.where(keep, cell, cell + keep.shape[1]), dim=1)[:, :longest]
    return order, torch.arange(longest, device=keep.device) < counts[:, None]
