"""Packing: between dense (B, N, D) tokens and the kept (T, D) rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.tokens import Grid, Packing, cells


def pack(keep: Tensor, grid: Grid) -> Packing:
    """Plan the packing of the kept tokens; this is the one synchronisation with the host in a forward.

    Args:
        keep: (B, N) bool, at least one kept token in every sample.
        grid: the token grid, N cells.

    Returns:
        The packing; `dense.reshape(B * N, D).index_select(0, packing.index)` packs.

    Raises:
        InputError: keep is not a bool tensor (B, N) with data, or a sample keeps no token.
    """
    if keep.dim() != 2 or keep.shape[1] != cells(grid) or not keep.numel():
        raise InputError(
            f"keep has shape {tuple(keep.shape)}, expected (B, {cells(grid)}) for the grid {grid} with B at least 1."
        )
    if keep.dtype != torch.bool:
        raise InputError(f"keep is a tensor of {keep.dtype}, expected torch.bool.")
    if keep.is_meta:
        raise InputError(
            "keep is on the meta device, which holds no values to pack by; use a device that holds values."
        )
    counts = keep.sum(dim=1)
    lengths = tuple(counts.tolist())
    if not all(lengths):
        raise InputError(f"sample {lengths.index(0)} keeps no token; every sample must keep at least one.")
    index = torch.nonzero_static(keep.flatten(), size=sum(lengths)).squeeze(1)
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    sample = index.div(keep.shape[1], rounding_mode="floor")
    return Packing(lengths, index, sample, index - sample * keep.shape[1], cu_seqlens, grid)


def pack_index(index: Tensor, lengths: tuple[int, ...], grid: Grid) -> Packing:
    """Plan the packing of tokens whose number is known, without a synchronisation.

    Args:
        index: (B, M) int64, the cells of each sample, rising as far as they count.
        lengths: how many of the M entries of each sample count, at least one.
        grid: the token grid, N cells.

    Returns:
        The packing.
    """
    batch, longest = index.shape
    device = index.device
    sample = torch.arange(batch, device=device)[:, None].expand(batch, longest)
    cell, sample = index.reshape(-1), sample.reshape(-1)
    if set(lengths) != {longest}:
        counted = torch.tensor([row * longest + at for row, n in enumerate(lengths) for at in range(n)], device=device)
        cell, sample = cell.index_select(0, counted), sample.index_select(0, counted)
    return packing_of(lengths, sample, cell, grid)


def packing_of(lengths: tuple[int, ...], sample: Tensor, cell: Tensor, grid: Grid) -> Packing:
    """Build the packing of tokens that lie sample after sample.

    Args:
        lengths: tokens of each sample, T in total.
        sample: (T,) int64, the sample of each token.
        cell: (T,) int64, the raster index of each token in the grid.
        grid: the token grid, N cells.
    """
    offsets = torch.tensor([0, *lengths], device=cell.device).cumsum(0).to(torch.int32)
    return Packing(lengths, sample * cells(grid) + cell, sample, cell, offsets, grid)


def packing_of_some(packing: Packing, places: Sequence[int], rows: Tensor) -> Packing:
    """Build the packing of some samples.

    Args:
        packing: the packing of all samples.
        places: positions of the samples in it.
        rows: (t,) int64, their packed rows.
    """
    lengths = tuple(packing.lengths[place] for place in places)
    cell = packing.cell.index_select(0, rows)
    sample = torch.repeat_interleave(torch.tensor(lengths, device=cell.device), output_size=len(cell))
    return packing_of(lengths, sample, cell, packing.grid)


def unpack(rows: Tensor, packing: Packing) -> Tensor:
    """Put packed rows back on the dense grid, with zeros elsewhere.

    Args:
        rows: (T, D).
        packing: the one that they were packed with.

    Returns:
        (B, N, D).
    """
    count, width = len(packing.lengths), cells(packing.grid)
    dense = rows.new_zeros(count * width, rows.shape[1]).index_copy(0, packing.index, rows)
    return rearrange(dense, "(b n) d -> b n d", b=count)
