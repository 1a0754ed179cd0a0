"""Divide a grid into windows, in which tokens look for the token that they are merged into.

To compare every token with every destination takes time that grows with the square of the tokens. Within windows of a
bounded size it grows in proportion to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.tokens import Grid, cells

WHOLE = 2048
"""Cells of the largest grid that is not divided, unless a window is set."""
AIMED = 1024
"""Most cells of the windows that a larger grid is divided into, unless one is set."""


@dataclass(frozen=True)
class Tiling:
    """Windows of a grid, each of whole buckets; along an axis they differ by at most one bucket.

    Attributes:
        grid: 1 to 3 sizes.
        bucket: cells of a bucket along each axis.
        parts: number of windows along each axis.
    """

    grid: Grid
    bucket: tuple[int, ...]
    parts: tuple[int, ...]

    @property
    def count(self) -> int:
        """W, the number of windows."""
        return prod(self.parts)

    @property
    def buckets(self) -> tuple[int, ...]:
        """The buckets along each axis."""
        return tuple([-(-size // width) for size, width in zip(self.grid, self.bucket, strict=True)])

    def room(self) -> tuple[int, int]:
        """Return the most rows of a window that are no destinations, and the most destinations of one.

        A bucket with a row has one destination, so that both hold for any subset of the cells.
        """
        held = [-(-count // parts) for count, parts in zip(self.buckets, self.parts, strict=True)]
        sides = [min(size, count * width) for size, count, width in zip(self.grid, held, self.bucket, strict=True)]
        return prod(sides) - prod(held), prod(held)

    def window(self, bucket: Tensor) -> Tensor:
        """Return the window of each bucket, given by its raster index, (...) int64 both."""
        place, rest, count = torch.zeros_like(bucket), bucket, 1
        for size, parts in zip(reversed(self.buckets), reversed(self.parts), strict=True):
            place = place + (rest.remainder(size) * parts).div(size, rounding_mode="floor") * count
            rest = rest.div(size, rounding_mode="floor")
            count *= parts
        return place


def tiling(grid: Grid, bucket: tuple[int, ...], window: int | tuple[int, ...] | None) -> Tiling | None:
    """Divide a grid into windows.

    Args:
        grid: 1 to 3 sizes.
        bucket: cells of a bucket along each axis.
        window: the most cells of a window along every axis, or along each; at least one bucket. None leaves grids of up
            to `WHOLE` cells whole, and halves the longest side of the windows of larger ones, or divides it into three
            and so on, until they have at most `AIMED` cells.

    Returns:
        The windows; None if one of them covers the grid.

    Raises:
        InputError: the window does not have one positive size, or one for each axis.
    """
    buckets = [-(-size // width) for size, width in zip(grid, bucket, strict=True)]
    if window is None:
        parts = _automatic(buckets, bucket) if cells(grid) > WHOLE else [1] * len(grid)
    else:
        most = [window] * len(grid) if isinstance(window, int) else list(window)
        if len(most) != len(grid) or min(most) < 1:
            raise InputError(
                f"window is {window}, expected a positive number of cells, or one for each axis of the grid {grid}."
            )
        held = [max(1, size // width) for size, width in zip(most, bucket, strict=True)]
        parts = [-(-count // inside) for count, inside in zip(buckets, held, strict=True)]
    return None if prod(parts) == 1 else Tiling(grid, bucket, tuple(parts))


def _automatic(buckets: Sequence[int], bucket: Sequence[int]) -> list[int]:
    """Return the number of windows along each axis, so that none has more than `AIMED` cells."""
    parts = [1] * len(buckets)
    while True:
        sides = [-(-count // n) * width for count, n, width in zip(buckets, parts, bucket, strict=True)]
        open_ = [axis for axis, (count, n) in enumerate(zip(buckets, parts, strict=True)) if n < count]
        if prod(sides) <= AIMED or not open_:
            return parts
        parts[max(open_, key=sides.__getitem__)] += 1


@dataclass(frozen=True)
class Windows:
    """The rows and destinations of every window of every sample, window after window, sample after sample.

    Attributes:
        rows: (B, W, S) int64, the rows that may be merged into others; -1 behind the last.
        table: (B, W, K) int64, the rows of the destinations; behind the last, one of them again.
    """

    rows: Tensor
    table: Tensor

    @property
    def pairs(self) -> int:
        """The number of pairs of rows that are compared in one sample."""
        return self.rows.shape[1] * self.rows.shape[2] * self.table.shape[2]


def windows_of(tiling: Tiling, bucket: Tensor, sample: Tensor, stays: Tensor, table: Tensor) -> Windows:
    """List the rows and destinations of every window.

    Args:
        tiling: the W windows of the grid.
        bucket: (T,) int64, raster index of each row's bucket.
        sample: (T,) int64, the sample of each row.
        stays: (T,) bool, true for rows that are not merged into others.
        table: (B, buckets) int64, the row of each bucket's destination, -1 where it has none.
    """
    batch, count = len(table), tiling.count
    room, places = tiling.room()
    own = tiling.window(bucket) + sample * count
    own = torch.where(stays, batch * count, own)  # behind the last window
    rows = _grouped(own, batch * count + 1, room)[:-1]
    every = torch.arange(table.shape[1], device=table.device)
    held = _grouped(tiling.window(every), count, places)
    found = torch.where(held < 0, -1, table[:, held.clamp(min=0)])
    found = torch.where(found < 0, found.amax(dim=-1, keepdim=True).clamp(min=0), found)
    return Windows(rows.view(batch, count, room), found)


def _grouped(group: Tensor, groups: int, room: int) -> Tensor:
    """List the members of each group in order, (groups, room) int64, -1 behind the last; further ones are left out."""
    order = group.argsort(stable=True)
    sorted_group = group.index_select(0, order)
    start = torch.searchsorted(sorted_group, torch.arange(groups, device=group.device))
    rank = torch.arange(len(group), device=group.device) - start.index_select(0, sorted_group)
    place = torch.where(rank < room, sorted_group * room + rank, groups * room)
    return order.new_full((groups * room + 1,), -1).index_copy(0, place, order)[:-1].view(groups, room)
