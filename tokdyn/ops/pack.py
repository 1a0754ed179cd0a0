"""Packing: dense (B, N, D) rows to the kept (T, D) rows and back."""

from __future__ import annotations

import torch
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.tokens import Grid, Packing, cells


def pack(keep: Tensor, grid: Grid) -> Packing:
    """Plan the packing of the kept tokens. The one host synchronisation of a forward happens here.

    Args:
        keep: (B, N) bool, at least one kept token in every sample.
        grid: the token grid, N cells.

    Returns:
        The packing; `dense.reshape(B * N, D).index_select(0, packing.index)` are the packed rows.

    Raises:
        InputError: keep has another shape than (B, N) or a sample without a kept token.
    """
    if keep.dim() != 2 or keep.shape[1] != cells(grid):
        raise InputError(f"keep has shape {tuple(keep.shape)}, expected (B, {cells(grid)}) for the grid {grid}.")
    counts = keep.sum(dim=1)
    lengths = tuple(counts.tolist())
    if not all(lengths):
        raise InputError(f"sample {lengths.index(0)} keeps no token; every sample must keep at least one.")
    index = torch.nonzero_static(keep.flatten(), size=sum(lengths)).squeeze(1)
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    sample = index.div(keep.shape[1], rounding_mode="floor")
    return Packing(lengths, index, sample, index - sample * keep.shape[1], cu_seqlens, grid)


def unpack(rows: Tensor, packing: Packing) -> Tensor:
    """Put packed rows back on the dense grid, zero elsewhere.

    Args:
        rows: (T, D).
        packing: the plan they were packed with.

    Returns:
        (B, N, D).
    """
    count, width = len(packing.lengths), cells(packing.grid)
    dense = rows.new_zeros(count * width, rows.shape[1]).index_copy(0, packing.index, rows)
    return dense.view(count, width, rows.shape[1])
