"""Plug-back: the nearest kept cell of every cell, exactly, ties to the lowest raster index."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokdyn.ops.device import asking_waits
from tokdyn.tokens import Grid, cells

_BROADCAST_LIMIT = 1 << 24


def nearest_kept(keep: Tensor, grid: Grid) -> Tensor:
    """Raster index of the nearest kept cell (Euclidean), for every cell of a 1-D, 2-D or 3-D grid.

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
        best = _along_axis(best, axis, count)
    return best.view(len(keep), count).remainder(count).long()


def _along_rows(keep: Tensor, count: int, limit: int, dtype: torch.dtype) -> Tensor:
    """Keys of the nearest kept cell in the same row: running maximum from the left, minimum from the right."""
    width = keep.shape[-1]
    column = torch.arange(width, device=keep.device, dtype=dtype)
    left = torch.where(keep, column, -width).cummax(dim=-1).values
    right = torch.where(keep, column, 2 * width).flip(-1).cummin(dim=-1).values.flip(-1)
    to_left, to_right = column - left, right - column
    nearest = torch.where(to_left <= to_right, left, right)
    distance = torch.minimum(to_left, to_right)
    first = torch.arange(count // width, device=keep.device, dtype=dtype).mul_(width).view(*keep.shape[1:-1], 1)
    return torch.where(distance < width, distance * distance * count + first + nearest, limit)


def _along_axis(source: Tensor, axis: int, count: int) -> Tensor:
    """Minimum over the cells of one axis of their key plus the squared distance along it."""
    size = source.shape[axis]
    waits = asking_waits(source)
    if waits and source.numel() * size <= _BROADCAST_LIMIT:
        line = torch.arange(size, device=source.device, dtype=source.dtype)
        steps = (line[:, None] - line).square() * count
        return (source.unsqueeze(axis) + steps.view(size, size, *[1] * (source.dim() - axis - 1))).amin(dim=axis + 1)
    best = source.clone()
    for distance in range(1, size):
        step = distance * distance * count  # nothing farther away can win below this
        if not waits and int(best.max()) < step:
            break
        ahead, behind = best.narrow(axis, distance, size - distance), best.narrow(axis, 0, size - distance)
        torch.minimum(ahead, source.narrow(axis, 0, size - distance) + step, out=ahead)
        torch.minimum(behind, source.narrow(axis, distance, size - distance) + step, out=behind)
    return best


def disc(radius: float, sizes: Sequence[int]) -> tuple[list[tuple[int, ...]], list[float]]:
    """Integer offsets within a radius that a grid of these sizes has room for, in raster order, and their squares."""
    offsets: list[tuple[int, ...]] = [()]
    for size in sizes:
        reach = min(math.floor(radius), size - 1)
        offsets = [(*offset, step) for offset in offsets for step in range(-reach, reach + 1)]
    inside = [offset for offset in offsets if sum(step * step for step in offset) <= radius * radius]
    return inside, [float(sum(step * step for step in offset)) for offset in inside]
