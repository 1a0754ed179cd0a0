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
from tokdyn.ops.windows import Tiling, Windows, windows_of
from tokdyn.tokens import Grid, cells


@dataclass(frozen=True)
class Destinations:
    """The rows that others may be merged into, at most one for each of K buckets.

    Attributes:
        table: (B, K) int64, the row of each bucket's destination, -1 where the bucket holds no row.
        mask: (T,) bool, true for rows that are not merged into others: destinations, and rows to keep.
        others: (B, N - K) int64, the other rows, if every cell of the grid has a row and none is to be kept; otherwise
            None.
        stay: the most rows of each sample that are not merged into others; K without rows to keep.
        windows: the rows and destinations of each window; None if rows are compared with all destinations.
    """

    table: Tensor
    mask: Tensor
    others: Tensor | None
    stay: tuple[int, ...]
    windows: Windows | None = None

    @property
    def full(self) -> bool:
        """Whether every cell of the grid has a row, and none is to be kept."""
        return self.others is not None

    def pairs(self, length: int, alike: bool) -> int:
        """Count the pairs of rows that are compared in a sample.

        Args:
            length: rows of the sample.
            alike: whether all samples have the same number of rows, and of rows to merge.
        """
        if self.windows is not None:
            return self.windows.pairs
        buckets = self.table.shape[1]
        return (length - buckets if self.full and alike else length) * buckets


def destinations(
    cell: Tensor,
    sample: Tensor,
    batch: int,
    grid: Grid,
    bucket: int | Sequence[int] = 2,
    seed: int | None = None,
    step: int | Tensor = 0,
    importance: Tensor | None = None,
    tiling: Tiling | None = None,
    keep: Tensor | None = None,
    stay: Sequence[int] | None = None,
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
        tiling: windows of the grid in which rows are compared; None compares them with all destinations.
        keep: (T,) bool, rows that are neither destinations nor merged into others; None if there are none.
        stay: the most rows of each sample that are not merged into others, if it is known; otherwise they are counted
            where some are to be kept, for which the host waits.

    Returns:
        The destinations, K buckets per sample.

    Raises:
        InputError: the bucket does not have one positive size, or one for each axis.
    """
    held, count = _buckets(cell, grid, widths(grid, bucket))
    place = held + sample * count
    rows = torch.arange(len(cell), device=cell.device)
    if importance is not None:
        importance = importance if keep is None else importance.masked_fill(keep, -math.inf)
        top = importance.new_full((batch * count,), -math.inf).scatter_reduce(0, place, importance, "amax")
        key = torch.where(importance >= top.index_select(0, place), rows, len(cell))
    elif seed is not None:
        if isinstance(step, Tensor) and step.numel() > 1:
            step = step.index_select(0, sample)
        key = mix(mix(mix(torch.tensor(seed, device=cell.device)) + step) + cell) * cells(grid) + cell
    else:
        key = rows
    largest = torch.iinfo(torch.int64).max
    key = key if keep is None else key.masked_fill(keep, largest)
    least = key.new_full((batch * count,), largest).scatter_reduce(0, place, key, "amin")
    chosen = key == least.index_select(0, place)
    if importance is not None:
        chosen &= key < len(cell)
    if keep is not None:
        chosen &= ~keep
    table = rows.new_full((batch * count,), -1).scatter_reduce(0, place, torch.where(chosen, rows, -1), "amax")
    table, others, stays = table.view(batch, count), None, chosen if keep is None else chosen | keep
    if len(cell) == batch * cells(grid) and keep is None:
        others = torch.nonzero_static(~chosen, size=len(cell) - batch * count).view(batch, -1)
    if stay is None:
        counted = None if keep is None else rows.new_zeros(batch).index_add(0, sample, stays.long())
        stay = (count,) * batch if counted is None else counted.tolist()
    windows = None if tiling is None else windows_of(tiling, held, sample, stays, table)
    return Destinations(table, stays, others, tuple(stay), windows)


def grid_destinations(
    batch: int,
    grid: Grid,
    device: torch.device,
    bucket: int | Sequence[int] = 2,
    seed: int | None = None,
    step: int | Tensor = 0,
    tiling: Tiling | None = None,
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
        tiling: see `destinations`.

    Returns:
        The destinations of B * N rows.
    """
    count, sides = cells(grid), widths(grid, bucket)
    cell = torch.arange(count, device=device)
    first = torch.arange(batch, device=device)[:, None]
    if seed is None:
        table = _corners(grid, sides, device)[None]
    elif isinstance(step, Tensor) and step.numel() > 1:
        sample = first.expand(-1, count).flatten()
        return destinations(cell.repeat(batch), sample, batch, grid, bucket, seed, step, tiling=tiling)
    else:
        table = destinations(cell, torch.zeros_like(cell), 1, grid, bucket, seed, step).table
    mask = torch.zeros(count, dtype=torch.bool, device=device).index_fill(0, table.flatten(), True)
    others = torch.nonzero_static(~mask, size=count - table.shape[1]).view(1, -1)
    windows = None
    if tiling is not None:
        one = windows_of(tiling, _buckets(cell, grid, sides)[0], torch.zeros_like(cell), mask, table)
        own, places = one.rows, first[..., None] * count
        windows = Windows(torch.where(own < 0, -1, own + places), one.table + places)
    stay = (table.shape[1],) * batch
    return Destinations(table + first * count, mask.repeat(batch), others + first * count, stay, windows)


def staying(keep: Tensor, grid: Grid, bucket: int | Sequence[int] = 2, full: bool = True) -> list[int]:
    """Count the rows of each sample that are not merged into others: those to keep, and one of every other bucket.

    Args:
        keep: (B, N) bool, the cells to keep.
        grid: 1 to 3 sizes, N cells.
        bucket: see `destinations`.
        full: whether every cell has a row. If not, this is the most that there can be.
    """
    place, count = _buckets(torch.arange(keep.shape[1], device=keep.device), grid, widths(grid, bucket))
    if not full:
        return [kept + count for kept in keep.sum(1).tolist()]
    others = torch.zeros(len(keep), count, dtype=torch.int64, device=keep.device).index_add(1, place, (~keep).long())
    counted: list[int] = (keep.sum(1) + (others > 0).sum(1)).tolist()
    return counted


def widths(grid: Grid, bucket: int | Sequence[int]) -> tuple[int, ...]:
    """Return the cells of a bucket along each axis."""
    sides = (bucket,) * len(grid) if isinstance(bucket, int) else tuple(bucket)
    if len(sides) != len(grid) or min(sides) < 1:
        raise InputError(
            f"bucket is {bucket}, expected a positive number of cells, or one for each axis of the grid {grid}."
        )
    return sides


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
