"""The frozen state that flows through a model: the grid, where packed tokens lie, and what a router decided."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Grid = tuple[int, ...]
"""Sizes of a token grid, slowest axis first: (columns,), (rows, columns) or (frames, rows, columns)."""


TILE = 16
"""Rows that attention kernels take at once: padded rows are a multiple of it, which costs less than an odd end."""


def aligned(rows: int) -> int:
    """The next multiple of `TILE`."""
    return -(-rows // TILE) * TILE


def cells(grid: Grid) -> int:
    """Number of cells of a grid, which is the number of tokens N of a dense sequence."""
    return math.prod(grid)


@dataclass(frozen=True)
class Packing:
    """Where the kept tokens of a batch lie: the rows of a packed (T, D) tensor, sample after sample in raster order.

    Attributes:
        lengths: kept tokens of each sample, on the host; they sum to T.
        index: (T,) int64, row of each kept token in the dense (B*N, D) tensor.
        sample: (T,) int64, the sample each token belongs to.
        cell: (T,) int64, raster index of each token in its own grid.
        cu_seqlens: (B + 1,) int32, offsets of the samples in the packed rows.
        grid: the dense grid, N cells.
    """

    lengths: tuple[int, ...]
    index: Tensor
    sample: Tensor
    cell: Tensor
    cu_seqlens: Tensor
    grid: Grid

    @property
    def total(self) -> int:
        """Packed rows T."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """Rows of the longest sample, M."""
        return max(self.lengths)

    @cached_property
    def padded(self) -> Padding:
        """The index maps between packed rows and a padded (B, R, D) tensor, made once for all blocks."""
        return Padding.of(self)


@dataclass(frozen=True)
class Padding:
    """Index maps between packed (T, D) and padded (B, R, D) rows.

    Attributes:
        rows: R, the rows of the longest sample, aligned to `TILE`.
        gather: (B*R,) int64, packed row of each padded slot; empty slots repeat a row of their own sample.
        scatter: (T,) int64, padded slot of each packed row.
        bias: (B, 1, 1, R) fp32, 0 for real keys and -inf for empty slots.
    """

    rows: int
    gather: Tensor
    scatter: Tensor
    bias: Tensor

    @staticmethod
    def of(packing: Packing) -> Padding:
        """Build the maps on the packing's device without a host synchronisation."""
        import torch

        starts = packing.cu_seqlens[:-1].to(packing.index.dtype)
        lengths = packing.cu_seqlens.diff().to(packing.index.dtype)
        rows = aligned(packing.longest)
        slot = torch.arange(rows, device=packing.index.device)
        empty = slot >= lengths[:, None]
        gather = (starts[:, None] + torch.minimum(slot, (lengths - 1)[:, None])).flatten()
        row = torch.arange(packing.total, device=packing.index.device)
        scatter = row - starts.index_select(0, packing.sample) + packing.sample * rows
        bias = torch.zeros(empty.shape, device=packing.index.device).masked_fill(empty, float("-inf"))
        return Padding(rows, gather, scatter, bias[:, None, None, :])


@dataclass(frozen=True)
class Routing:
    """What a router decided for one forward.

    Attributes:
        probability: (B, N) fp32, boundary probability p of every cell.
        keep: (B, N) bool, the tokens that the blocks saw.
        natural_keep: (B, N) bool, the tokens with p > 0.5, before tail drop.
        grid: the token grid, N cells.
        losses: auxiliary losses by name, scalars; "ratio" is the ratio loss over the whole batch at the model's target.
        decided: (B, N) bool, the tokens that were chosen before tail drop, where that was not the router's p > 0.5.
    """

    probability: Tensor
    keep: Tensor
    natural_keep: Tensor
    grid: Grid
    losses: dict[str, Tensor] = field(default_factory=dict)
    decided: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """(B,) int64, tokens kept of each sample."""
        return self.keep.sum(dim=1)

    @property
    def natural_kept(self) -> Tensor:
        """(B,) int64, tokens kept of each sample before tail drop."""
        return self.natural_keep.sum(dim=1)
