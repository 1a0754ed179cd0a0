"""Choose the tokens that others may be merged into: one in every bucket of neighbouring cells.

Source: ToMe for diffusion (arXiv 2303.17604). Buckets of any size replace its 2x2 cells, so that it works on any set of
tokens; with buckets of 2 on a full grid, the two are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.ops.dropping import mix
from tokdyn.tokens import Grid, cells


@dataclass(frozen=True)
class Destinations:
    """The rows that others may be merged into, at most one for each of K buckets.

    Attributes:
        table: (B, K) int64, the row of each bucket's destination, -1 where the bucket holds no row.
        mask: (T,) bool, true for destinations.
        others: (B, N - K) int64, the other rows, if every cell of the grid has a row; otherwise None.
    """

    table: Tensor
    mask: Tensor
    others: Tensor | None

    @property
    def full(self) -> bool:
        """Whether every cell of the grid has a row."""
        return self.others is not None


def destinations(
    cell: Tensor,
    sample: Tensor,
    batch: int,
    grid: Grid,
    bucket: int | Sequence[int] = 2,
    seed: int | None = None,
    step: int | Tensor = 0,
    importance: Tensor | None = None,
) -> Destinations:
    """Choose one destination in every bucket of neighbouring cells that holds a token.

    Args:
        cell: (T,) int64, raster index of each row in its own grid.
        sample: (T,) int64, the sample that each row belongs to.
        batch: B.
        grid: 1 to 3 sizes.
        bucket: cells of a bucket along every axis, or along each.
        seed: None chooses the first row of a bucket in raster order; a number chooses the one with the smallest hash
            of seed, step and cell, the same for every sample of a step.
        step: a number, or a tensor (B,) or (1,), that changes the hash from step to step.
        importance: (T,) chooses the most important row of each bucket instead, the first among equals.

    Returns:
        The destinations, K buckets per sample.

    Raises:
        InputError: the bucket does not have one positive size, or one for each axis.
    """
    place, count = _buckets(cell, grid, _widths(grid, bucket))
    place = place + sample * count
    rows = torch.arange(len(cell), device=cell.device)
    if importance is not None:
        top = importance.new_full((batch * count,), -math.inf).scatter_reduce(0, place, importance, "amax")
        key = torch.where(importance >= top.index_select(0, place), rows, len(cell))
    elif seed is not None:
        if isinstance(step, Tensor) and step.numel() > 1:
            step = step.index_select(0, sample)
        key = mix(mix(mix(torch.tensor(seed, device=cell.device)) + step) + cell) * cells(grid) + cell
    else:
        key = rows
    largest = torch.iinfo(torch.int64).max
    least = key.new_full((batch * count,), largest).scatter_reduce(0, place, key, "amin")
    chosen = key == least.index_select(0, place)
    if importance is not None:
        chosen &= key < len(cell)
    table = rows.new_full((batch * count,), -1).scatter_reduce(0, place, torch.where(chosen, rows, -1), "amax")
    others = None
    if len(cell) == batch * cells(grid):
        others = torch.nonzero_static(~chosen, size=len(cell) - batch * count).view(batch, -1)
    return Destinations(table.view(batch, count), chosen, others)


def grid_destinations(
    batch: int,
    grid: Grid,
    device: torch.device,
    bucket: int | Sequence[int] = 2,
    seed: int | None = None,
    step: int | Tensor = 0,
) -> Destinations:
    """Choose destinations for samples that have all cells of the grid.

    They depend on nothing else, so many blocks can share them.

    Args:
        batch: B.
        grid: 1 to 3 sizes, N cells.
        device: of the rows.
        bucket: see `destinations`.
        seed: see `destinations`.
        step: see `destinations`.

    Returns:
        The destinations of B * N rows.
    """
    count = cells(grid)
    cell = torch.arange(count, device=device)
    first = torch.arange(batch, device=device)[:, None]
    if seed is None:
        table = _corners(grid, _widths(grid, bucket), device)[None]
    elif isinstance(step, Tensor) and step.numel() > 1:
        return destinations(cell.repeat(batch), first.expand(-1, count).flatten(), batch, grid, bucket, seed, step)
    else:
        table = destinations(cell, torch.zeros_like(cell), 1, grid, bucket, seed, step).table
    mask = torch.zeros(count, dtype=torch.bool, device=device).index_fill(0, table.flatten(), True)
    others = torch.nonzero_static(~mask, size=count - table.shape[1]).view(1, -1)
    return Destinations(table + first * count, mask.repeat(batch), others + first * count)


def _widths(grid: Grid, bucket: int | Sequence[int]) -> list[int]:
    """Return the cells of a bucket along each axis."""
    widths = [bucket] * len(grid) if isinstance(bucket, int) else list(bucket)
    if len(widths) != len(grid) or min(widths) < 1:
        raise InputError(
            f"bucket is {bucket}, expected a positive number of cells, or one for each axis of the grid {grid}."
        )
    return widths


def _buckets(cell: Tensor, grid: Grid, widths: Sequence[int]) -> tuple[Tensor, int]:
    """Return the bucket of every cell, and the number of buckets."""
    place, rest, count = torch.zeros_like(cell), cell, 1
    for size, width in zip(reversed(grid), reversed(widths), strict=True):
        place = place + rest.remainder(size).div(width, rounding_mode="floor") * count
        rest = rest.div(size, rounding_mode="floor")
        count *= -(-size // width)
    return place, count


def _corners(grid: Grid, widths: Sequence[int], device: torch.device) -> Tensor:
    """Return the first cell of every bucket, (K,) int64."""
    cell = torch.zeros(1, dtype=torch.int64, device=device)
    for size, width in zip(grid, widths, strict=True):
        cell = (cell[:, None] * size + torch.arange(0, size, width, device=device)).flatten()
    return cell
