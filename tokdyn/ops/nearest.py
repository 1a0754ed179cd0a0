"""Plug-back: the nearest kept cell of every cell, exactly; ties go to the lowest raster index."""

from __future__ import annotations

import torch
from torch import Tensor

from tokdyn.tokens import Grid, cells

_BROADCAST_LIMIT = 1 << 24


def nearest_kept(keep: Tensor, grid: Grid) -> Tensor:
    """Find the raster index of the nearest kept cell (Euclidean) for every cell of a 1-D, 2-D or 3-D grid.

    One pass per axis over keys `squared distance * N + raster index`: the minimum of the keys is the nearest cell and
    breaks ties by raster index, so the passes compose exactly like a separable distance transform.

    Args:
        keep: (B, N) bool, at least one kept cell per sample.
        grid: sizes of the axes.

    Returns:
        (B, N) int64.
    """
    count = cells(grid)
    limit = (sum(size * size for size in grid) + 1) * count
    dtype = torch.int32 if 2 * limit < 2**31 else torch.int64
    best = _along_rows(keep.view(-1, *grid), count, limit, dtype)
    for axis in range(len(grid) - 1, 0, -1):
        best = along_axis(best, axis, count)
    return best.view(len(keep), count).remainder(count).long()


def _along_rows(keep: Tensor, count: int, limit: int, dtype: torch.dtype) -> Tensor:
    """Compute keys of the nearest kept cell in the same row: running maximum from the left, minimum from the right."""
    width = keep.shape[-1]
    column = torch.arange(width, device=keep.device, dtype=dtype)
    left = torch.where(keep, column, -width).cummax(dim=-1).values
    right = torch.where(keep, column, 2 * width).flip(-1).cummin(dim=-1).values.flip(-1)
    to_left, to_right = column - left, right - column
    nearest = torch.where(to_left <= to_right, left, right)
    distance = torch.minimum(to_left, to_right)
    first = torch.arange(count // width, device=keep.device, dtype=dtype).mul_(width).view(*keep.shape[1:-1], 1)
    return torch.where(distance < width, distance * distance * count + first + nearest, limit)


def along_axis(keys: Tensor, axis: int, count: int) -> Tensor:
    """Take the minimum over the cells of one axis of their key plus the squared distance along the axis.

    Args:
        keys: (B, *grid) integers, `squared distance * N + raster index`.
        axis: of the tensor, 1 or more.
        count: N.

    Returns:
        The shape and type of the keys.
    """
    size = keys.shape[axis]
    if keys.numel() * size <= _BROADCAST_LIMIT:
        line = torch.arange(size, device=keys.device, dtype=keys.dtype)
        steps = (line[:, None] - line).square() * count
        return (keys.unsqueeze(axis) + steps.view(size, size, *[1] * (keys.dim() - axis - 1))).amin(dim=axis + 1)
    best = keys.clone()
    for distance in range(1, size):
        shift_minimum(best, keys, axis, distance, count)
    return best


def shift_minimum(best: Tensor, keys: Tensor, axis: int, distance: int, count: int) -> None:
    """Lower the best keys to those of the cells at one distance along an axis, in place."""
    step, length = distance * distance * count, keys.shape[axis] - distance
    ahead, behind = best.narrow(axis, distance, length), best.narrow(axis, 0, length)
    torch.minimum(ahead, keys.narrow(axis, 0, length) + step, out=ahead)
    torch.minimum(behind, keys.narrow(axis, distance, length) + step, out=behind)
