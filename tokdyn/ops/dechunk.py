"""De-chunking: smooth the kept tokens by confidence, then give every cell the features of its nearest kept token.

Source: arXiv 2603.06351, de-chunking with a spatial kernel. The dense formulation costs (kept)^2 for the smoothing and
N * kept for the plug-back; here both are linear in N for a fixed kernel width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.ops.dispatch import has_cpu_form, may_replace
from tokdyn.ops.nearest import nearest_kept
from tokdyn.ops.pack import pack
from tokdyn.ops.precision import exact
from tokdyn.ops.routing import straight_through
from tokdyn.tokens import Grid, Packing, cells

BAND = 128
"""Longest axis that is smoothed by a matrix product."""
P_MIN = 1e-4
"""Least weight of a kept token in the smoothing, and one minus the largest."""
EPS = 1e-8
"""Added to the sum of weights that the smoothing divides by."""


def dechunk(features: Tensor, probability: Tensor, keep: Tensor, grid: Grid, sigma: float | None) -> Tensor:
    """De-chunk packed tokens to the dense grid, in fp32 (fp64 for fp64 features), with autocast off.

    With p clamped to [1e-4, 1 - 1e-4] and `w_ij = exp(-|u_i - u_j|^2 / (2 sigma^2)) p_j` over kept j,
    `out_i = p_i h_i + (1 - p_i) sum_j w_ij h_j / (sum_j w_ij + 1e-8)`; every cell takes the `out` of its nearest kept
    token, ties to the lowest raster index. Differentiable in features and probability.

    Args:
        features: (T, D), kept tokens packed sample after sample in raster order.
        probability: (B, N), boundary probability.
        keep: (B, N) bool, T true in all.
        grid: 1 to 3 sizes, N cells.
        sigma: kernel width in cells; None or 0 skips the smoothing.

    Returns:
        (B, N, D), the type of the features.

    Raises:
        InputError: shapes or types do not fit, a sample keeps no token, or sigma is negative or not finite.
    """
    grid = tuple(grid)
    if not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise InputError(f"the grid is {grid}, expected 1 to 3 sizes of at least 1 cell.")
    if probability.shape != keep.shape:
        raise InputError(f"probability is {tuple(probability.shape)} and keep {tuple(keep.shape)}; they must be equal.")
    packing = pack(keep, grid)
    if features.dim() != 2 or features.shape[0] != packing.total or not features.shape[1]:
        raise InputError(
            f"features have shape {tuple(features.shape)}, expected ({packing.total}, D): one row for each kept token."
        )
    if not features.is_floating_point() or not probability.is_floating_point():
        raise InputError(
            f"features are {features.dtype} and probability is {probability.dtype}, expected floating-point types."
        )
    return dechunk_packed(features, probability, keep, packing, sigma)


def dechunk_packed(
    features: Tensor,
    probability: Tensor,
    keep: Tensor,
    packing: Packing,
    sigma: float | None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """De-chunk tokens whose packing is known, then gate them and add a residual.

    Args:
        features: see `dechunk`.
        probability: see `dechunk`.
        keep: see `dechunk`.
        packing: of the kept tokens.
        sigma: see `dechunk`.
        gate: (B, N), the probability of the decision taken for each cell, for `straight_through`.
        residual: (B, N, D), added to the result.
        dtype: of the result; by default that of the features.

    Returns:
        (B, N, D).

    Raises:
        InputError: sigma is negative or not finite.
    """
    if sigma is not None and not 0 <= sigma < math.inf:
        raise InputError(f"sigma is {sigma}, expected a finite width in cells that is not negative.")
    with torch.autocast(features.device.type, enabled=False):
        rows = features
        if sigma:
            source = exact(features)
            kept = probability.to(source).flatten().index_select(0, packing.index).clamp(P_MIN, 1 - P_MIN)
            rows = smooth(source, kept, packing, sigma).to(features.dtype)
        batch, count = keep.shape
        if packing.total == batch * count:
            out = rearrange(rows, "(b n) d -> b n d", b=batch)
            out = out if gate is None else straight_through(out, gate)
            return (out if residual is None else out + residual).to(dtype or rows.dtype)
        rank = torch.cumsum(keep.flatten(), 0, dtype=torch.int64) - 1
        first = torch.arange(batch, device=keep.device)[:, None] * count
        index = rank.index_select(0, (nearest_kept(keep, packing.grid) + first).flatten())
        return plug_back(rows, index.view(batch, count), gate, residual, dtype or rows.dtype)


def plug_back(rows: Tensor, index: Tensor, gate: Tensor | None, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Compute `rows[index] * STE(gate) + residual`, with the straight-through gate of `straight_through`.

    Args:
        rows: (T, D).
        index: (B, N) int64, a row for each cell.
        gate: (B, N).
        residual: (B, N, D).
        dtype: of the result.

    Returns:
        (B, N, D).
    """
    if gate is None:
        out = rows.index_select(0, index.flatten())
    else:
        out = _GatedRows.apply(rows, index.flatten(), gate.flatten())
    out = rearrange(out, "(b n) d -> b n d", b=len(index))
    return (out if residual is None else out + residual).to(dtype)


class _GatedRows(torch.autograd.Function):
    """`straight_through(rows[index], gate)`, which keeps packed rows and not dense ones for the gate's gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(rows, index)
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (rows, index), (gradient,) = ctx.saved_tensors, gradients
        with torch.autocast(rows.device.type, enabled=False):
            to_rows = torch.zeros_like(rows).index_add(0, index, gradient) if ctx.needs_input_grad[0] else None
            to_gate = torch.linalg.vecdot(gradient, rows[index]) if ctx.needs_input_grad[2] else None
        return to_rows, None, to_gate


def smooths_on_grid(features: Tensor, grid: Grid) -> bool:
    """Whether smoothing blurs the whole grid, which costs FLOPs, or sums over lists of neighbours on the CPU.

    In 3-D a ball holds so many neighbours that lists of them are slower everywhere.
    """
    return len(grid) == 3 or not may_replace(features)


@has_cpu_form
def smooth(features: Tensor, kept: Tensor, packing: Packing, sigma: float) -> Tensor:
    """Smooth kept tokens by a normalised separable blur on the grid: static shapes, no synchronisation with the host.

    Args:
        features: (T, D) fp32 or fp64.
        kept: (T,) clamped probability p of each token.
        packing: where the tokens lie.
        sigma: kernel width in cells.

    Returns:
        (T, D), `p features + (1 - p) smoothed`, the type of the features.
    """
    weighted = torch.cat([features * kept[:, None], kept[:, None]], dim=1)
    count = cells(packing.grid)
    board = weighted.new_zeros(len(packing.lengths) * count, weighted.shape[1]).index_copy(0, packing.index, weighted)
    board = board.view(len(packing.lengths), *packing.grid, -1)
    for axis in range(len(packing.grid)):
        board = _blur(board, axis + 1, sigma)
    blurred = board.reshape(len(packing.lengths) * count, -1).index_select(0, packing.index)
    mean = blurred[:, :-1] / (blurred[:, -1:] + EPS)
    return torch.lerp(mean, features, kept[:, None])


def _blur(board: Tensor, axis: int, sigma: float) -> Tensor:
    """Convolve with a Gaussian along one axis: a band matrix on short axes, shifted sums on long ones."""
    size = board.shape[axis]
    if size <= BAND:
        line = torch.arange(size, device=board.device, dtype=board.dtype)
        band = torch.exp((line[:, None] - line).square() / (-2 * sigma * sigma))
        blurred: Tensor = torch.tensordot(band, board, dims=([1], [axis]))
        return blurred.movedim(0, axis)
    out = board
    # Farther cells weigh less than the type can resolve beside the least weight of a token's own.
    reach = int(math.sqrt(-2 * sigma * sigma * math.log(P_MIN * torch.finfo(board.dtype).eps / 4)))
    for distance in range(1, min(size, reach + 1)):
        weight = math.exp(-distance * distance / (2 * sigma * sigma))
        pad = [0, 0] * (board.dim() - axis - 1)
        length = size - distance
        out = out + weight * F.pad(board.narrow(axis, 0, length), [*pad, distance, 0])
        out = out + weight * F.pad(board.narrow(axis, distance, length), [*pad, 0, distance])
    return out
