"""Describe the tokens of a batch: their grid, how they are packed, and which of them a router keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Grid = tuple[int, ...]
"""Sizes of a token grid, slowest axis first: (columns,), (rows, columns) or (frames, rows, columns)."""


TILE = 16
"""Rows that attention kernels process at once; padding to a multiple of it costs less than an incomplete tile."""


def aligned(rows: int) -> int:
    """Round a number of rows up to a multiple of `TILE`."""
    return -(-rows // TILE) * TILE


def cells(grid: Grid) -> int:
    """Count the cells of a grid, which is the number of tokens N of a dense sequence."""
    return math.prod(grid)


class ImageTokens(NamedTuple):
    """The image tokens of a sample where not all of them belong to the image that is generated.

    Reference tokens are those of images that the model is given, clean, such as the picture that it edits.

    Attributes:
        grid: the grid of the generated tokens.
        references: the grids of the reference images, in the order in which their tokens come.
        leading: how many of these images come before the generated tokens; the others come after them.
        rotation: for each sample of the batch, or one for all, by how many places its sequence of text and image
            tokens must be rotated to the left for the image tokens to come where `Blocks.image` says; () if they come
            there already.
    """

    grid: Grid
    references: tuple[Grid, ...] = ()
    leading: int = 0
    rotation: tuple[int, ...] = ()


def beside(tokens: ImageTokens) -> tuple[int, int]:
    """Count the reference tokens before and after the generated tokens."""
    counts = [cells(grid) for grid in tokens.references]
    return sum(counts[: tokens.leading]), sum(counts[tokens.leading :])


def total(tokens: ImageTokens) -> int:
    """Count all image tokens of a sample, those of references included."""
    return cells(tokens.grid) + sum(beside(tokens))


@dataclass(frozen=True)
class Packing:
    """Which samples and cells packed rows (T, D) belong to: the kept tokens of a batch, sample after sample.

    Within a sample the rows are in raster order.

    Attributes:
        lengths: number of kept tokens of each sample, on the host; they sum to T.
        index: (T,) int64, the row of each kept token in the dense (B * N, D) tensor.
        sample: (T,) int64, the sample that each token belongs to.
        cell: (T,) int64, the raster index of each token in its grid.
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
        """T, the number of packed rows."""
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        """The number of rows of the sample that has most."""
        return max(self.lengths)

    @cached_property
    def padded(self) -> Padding:
        """The index maps between packed and padded rows, built at the first use and kept for all blocks."""
        return Padding.of(self)


@dataclass(frozen=True)
class Padding:
    """Index maps between packed (T, D) and padded (B, R, D) rows.

    Attributes:
        rows: R, the number of rows of the longest sample, rounded up to a multiple of `TILE`.
        gather: (B * R,) int64, the packed row of each row of the padded tensor; padding repeats the last row of its
            sample.
        scatter: (T,) int64, the row in the padded tensor, flattened to (B * R, D), of each packed row.
        bias: (B, 1, 1, R) fp32 for the logits of attention: 0 for the keys of real rows and -inf for padding.
    """

    rows: int
    gather: Tensor
    scatter: Tensor
    bias: Tensor

    @staticmethod
    def of(packing: Packing) -> Padding:
        """Build the maps on the packing's device, without synchronising with it."""
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
    """The decisions of a router in one call.

    Attributes:
        probability: (B, N) fp32, the boundary probability p of every cell.
        keep: (B, N) bool, the tokens that the blocks get.
        natural_keep: (B, N) bool, the tokens with p > 0.5, before tail drop; at least one of each sample.
        grid: the token grid, N cells.
        losses: scalar auxiliary losses by name; "ratio" is the ratio loss of the whole batch at the model's target.
        decided: (B, N) bool, the tokens selected before tail drop if a plan was given; otherwise None, and
            `natural_keep` holds them.
    """

    probability: Tensor
    keep: Tensor
    natural_keep: Tensor
    grid: Grid
    losses: dict[str, Tensor] = field(default_factory=dict)
    decided: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """Number of kept tokens of each sample, (B,) int64."""
        return self.keep.sum(dim=1)

    @property
    def natural_kept(self) -> Tensor:
        """Number of tokens with p > 0.5 of each sample, before tail drop, (B,) int64."""
        return self.natural_keep.sum(dim=1)
