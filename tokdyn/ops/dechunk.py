"""De-chunking: smooth the kept tokens by confidence, then give every cell the features of its nearest kept token.

Source: arXiv 2603.06351, de-chunking with a spatial kernel. The dense formulation costs (kept)^2 for the smoothing and
N * kept for the plug-back; both forms here are linear in N for a fixed kernel width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.ops.device import asking_waits, by_hand
from tokdyn.ops.nearest import disc, nearest_kept
from tokdyn.ops.pack import pack
from tokdyn.ops.precision import exact
from tokdyn.ops.routing import straight_through
from tokdyn.tokens import Grid, Packing, cells

BAND = 128
"""Longest axis that is smoothed by a matrix product."""
_P_MIN = 1e-4
_EPS = 1e-8
_PART, _SMALL_PART = 1 << 20, 1 << 18  # numbers that stay in the cache while they are multiplied, or added to


def dechunk(features: Tensor, probability: Tensor, keep: Tensor, grid: Grid, sigma: float | None) -> Tensor:
    """De-chunk packed tokens to the dense grid, in fp32 (fp64 for fp64 features), with autocast off.

    With p clamped to [1e-4, 1 - 1e-4] and w_ij = exp(-|u_i - u_j|^2 / (2 sigma^2)) p_j over kept j,
    out_i = p_i h_i + (1 - p_i) sum_j w_ij h_j / (sum_j w_ij + 1e-8); every cell takes out of its nearest kept token,
    ties to the lowest raster index. Differentiable in features and probability.

    Args:
        features: (T, D), kept tokens packed sample after sample in raster order.
        probability: (B, N), boundary probability.
        keep: (B, N) bool, T true in all.
        grid: 1 to 3 sizes, N cells.
        sigma: kernel width in cells; None or 0 skips the smoothing.

    Returns:
        (B, N, D), the features' type.

    Raises:
        InputError: shapes or types that do not fit, an empty sample, or a sigma that is no width.
    """
    grid = tuple(grid)
    if not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise InputError(f"the grid is {grid}, expected 1 to 3 sizes of at least 1 cell.")
    if probability.shape != keep.shape:
        raise InputError(f"probability is {tuple(probability.shape)} and keep {tuple(keep.shape)}; they must be equal.")
    packing = pack(keep, grid)
    if features.dim() != 2 or features.shape[0] != packing.total or not features.shape[1]:
        raise InputError(
            f"features have shape {tuple(features.shape)}, expected ({packing.total}, D): one row a token."
        )
    if not features.is_floating_point() or not probability.is_floating_point():
        raise InputError(f"features are {features.dtype} and probability {probability.dtype}, expected real numbers.")
    return dechunk_packed(features, probability, keep, packing, sigma)


def dechunk_packed(
    features: Tensor,
    probability: Tensor,
    keep: Tensor,
    packing: Packing,
    sigma: float | None,
    gate: Tensor | None = None,
    onto: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`dechunk` for tokens whose packing is known already; arguments as there.

    `gate` (B, N) is the probability of the decision taken for each cell: the result passes a gradient to it as
    `straight_through(dechunk(...), gate)` does, which would have to keep the dense result for that. `onto` (B, N, D) is
    added, and the sum returned in `dtype`; without gradients that takes no pass over the result of its own.
    """
    if sigma is not None and not 0 <= sigma < math.inf:
        raise InputError(f"sigma is {sigma}, expected a finite width in cells that is not negative.")
    with torch.autocast(features.device.type, enabled=False):
        rows = features
        if sigma:
            source = exact(features)
            kept = probability.to(source).flatten().index_select(0, packing.index).clamp(_P_MIN, 1 - _P_MIN)
            form = _smooth_on_grid if smooths_on_grid(features, packing.grid) else _smooth_by_lists
            rows = form(source, kept, packing, float(sigma)).to(features.dtype)
        batch, count = keep.shape
        dtype = rows.dtype if dtype is None else dtype
        if packing.total == batch * count:
            out = rows.view(batch, count, -1)
            out = out if gate is None else straight_through(out, gate)
            return (out if onto is None else out + onto).to(dtype)
        rank = torch.cumsum(keep.flatten(), 0, dtype=torch.int64) - 1
        first = torch.arange(batch, device=keep.device)[:, None] * count
        plug = rank.index_select(0, (nearest_kept(keep, packing.grid) + first).flatten())
        if onto is not None and not torch.is_grad_enabled() and by_hand(rows):
            return _sum(rows, plug, onto, dtype)
        out = rows.index_select(0, plug) if gate is None else _PlugBack.apply(rows, plug, gate.flatten())
        out = out.view(batch, count, -1)
        return (out if onto is None else out + onto).to(dtype)


def _sum(rows: Tensor, plug: Tensor, onto: Tensor, dtype: torch.dtype) -> Tensor:
    """rows[plug] + onto, part by part."""
    out = torch.empty(onto.shape, dtype=dtype, device=onto.device)
    part = max(1, _SMALL_PART // rows.shape[1])
    parts = (torch.split(each, part) for each in (out.flatten(0, 1), onto.flatten(0, 1), plug))
    for place, start, at in zip(*parts, strict=True):
        place.copy_(rows.index_select(0, at) + start)
    return out


class _PlugBack(torch.autograd.Function):
    """rows[plug]; backward as if every row of the result had been multiplied by its gate."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plug: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(rows, plug)
        return rows.index_select(0, plug)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (rows, plug), (gradient,) = ctx.saved_tensors, grads
        with torch.autocast(rows.device.type, enabled=False):
            back = torch.zeros_like(rows).index_add(0, plug, gradient) if ctx.needs_input_grad[0] else None
            if not ctx.needs_input_grad[2]:
                return back, None, None
            part = len(plug) if asking_waits(rows) else max(1, _PART // rows.shape[1])
            parts = zip(torch.split(gradient, part), torch.split(plug, part), strict=True)
            return back, None, torch.cat([torch.linalg.vecdot(g, rows.index_select(0, at)) for g, at in parts])


def smooths_on_grid(features: Tensor, grid: Grid) -> bool:
    """Whether smoothing takes its dense form: in 3-D a ball holds so many neighbours that lists of them lose."""
    return len(grid) == 3 or asking_waits(features)


def _smooth_by_lists(features: Tensor, kept: Tensor, packing: Packing, sigma: float) -> Tensor:
    """Smoothing as one weighted bag of neighbours per token: on CPU, where their number is known at once.

    Args:
        features: (T, D) fp32 or fp64.
        kept: (T,) clamped probability of each token.
        packing: the tokens' places.
        sigma: kernel width in cells.

    Returns:
        (T, D), the features' type.
    """
    p = kept.double()  # a few numbers a token: exact weights halve the error of the sums at no cost
    token, neighbour, kernel, starts = _neighbours(packing, _reach(features.dtype, p.detach(), sigma), sigma)
    weight = kernel * p.index_select(0, neighbour)
    share = (1 - p) / (torch.zeros_like(p).index_add(0, token, weight) + _EPS)
    weight = (weight * share.index_select(0, token)).to(features.dtype)
    smooth = F.embedding_bag(neighbour, features, starts, mode="sum", per_sample_weights=weight)
    return torch.addcmul(smooth, features, kept[:, None])


def _reach(dtype: torch.dtype, p: Tensor, sigma: float) -> Tensor:
    """(T,) cells from which on a kept token of weight 1 no longer counts beside a token's own weight p."""
    least = p.nan_to_num(_P_MIN).clamp(min=_P_MIN)  # not a number: the result is not either, wherever we look
    return (least * (torch.finfo(dtype).eps / 4)).log_().mul_(-2 * sigma * sigma).sqrt_()


def _neighbours(packing: Packing, reach: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pairs of kept tokens within the first one's reach, each token paired with itself too.

    Tokens are packed in raster order, so the neighbours in one line of the grid are a run of packed rows, found from
    the number of tokens before its ends.

    Returns:
        token, neighbour and kernel (fp64) of every pair, sorted by token; each token's first pair.
    """
    *lead, width = packing.grid
    index, total = packing.index, len(packing.lengths) * cells(packing.grid)
    farthest = min(float(reach.max()), math.hypot(*packing.grid))
    before = torch.zeros(total + 1, dtype=torch.int64, device=index.device)
    before[index + 1] = 1
    before = before.cumsum(0)
    offsets, squares = disc(farthest, lead)
    apart = torch.tensor(squares, dtype=torch.float64, device=index.device)
    left = (reach * reach)[:, None] - apart
    half = left.clamp(min=0).sqrt_().clamp_(max=width).long()
    inside = left >= 0
    line, stride = index.div(width, rounding_mode="floor")[:, None], 1
    rest = packing.cell.div(width, rounding_mode="floor")
    for axis in reversed(range(len(lead))):
        step = torch.tensor([offset[axis] for offset in offsets], device=index.device)
        there = rest.remainder(lead[axis])[:, None] + step
        inside &= (there >= 0) & (there < lead[axis])
        line = line + step * stride
        rest, stride = rest.div(lead[axis], rounding_mode="floor"), stride * lead[axis]
    column = packing.cell.remainder(width)
    first = (column[:, None] - half).clamp_(min=0).add_(line * width)
    last = (column[:, None] + half).clamp_(max=width - 1).add_(line * width + 1)
    start = before.take(first.clamp_(0, total))
    run = before.take(last.clamp_(0, total)).sub_(start).mul_(inside)
    ends = run.flatten().cumsum(0)
    shift = start.flatten().sub_(ends).add_(run.flatten())  # from a pair to its neighbour
    ends = ends.view_as(run)
    stops = ends[:, -1]
    starts = F.pad(stops[:-1], (1, 0))
    pairs = int(stops[-1])
    of = torch.repeat_interleave(run.flatten(), output_size=pairs)
    neighbour = torch.arange(pairs, device=index.device).add_(shift.index_select(0, of))
    token = torch.repeat_interleave(stops - starts, output_size=pairs)
    steps = torch.arange(-width, width, dtype=torch.float64, device=index.device)
    table = ((apart[:, None] + steps * steps) / (-2 * sigma * sigma)).exp_()
    entry = torch.arange(len(offsets), device=index.device) * len(steps) + width - column[:, None]
    entry = entry.flatten().index_select(0, of).add_(column.index_select(0, neighbour))
    return token, neighbour, table.flatten().index_select(0, entry), starts


def _smooth_on_grid(features: Tensor, kept: Tensor, packing: Packing, sigma: float) -> Tensor:
    """Smoothing as a normalised separable blur on the grid: static shapes, no synchronisation; arguments as above."""
    weighted = torch.cat([features * kept[:, None], kept[:, None]], dim=1)
    count = cells(packing.grid)
    board = weighted.new_zeros(len(packing.lengths) * count, weighted.shape[1]).index_copy(0, packing.index, weighted)
    board = board.view(len(packing.lengths), *packing.grid, -1)
    for axis in range(len(packing.grid)):
        board = _blur(board, axis + 1, sigma)
    blurred = board.reshape(len(packing.lengths) * count, -1).index_select(0, packing.index)
    mean = blurred[:, :-1] / (blurred[:, -1:] + _EPS)
    return torch.lerp(mean, features, kept[:, None])


def _blur(board: Tensor, axis: int, sigma: float) -> Tensor:
    """Gaussian along one axis: a band matrix on short axes, shifted sums on long ones."""
    size = board.shape[axis]
    if size <= BAND:
        line = torch.arange(size, device=board.device, dtype=board.dtype)
        band = torch.exp((line[:, None] - line).square() / (-2 * sigma * sigma))
        blurred: Tensor = torch.tensordot(band, board, dims=([1], [axis]))
        return blurred.movedim(0, axis)
    out = board
    reach = int(_reach(board.dtype, board.new_tensor(_P_MIN, dtype=torch.float64), sigma))
    for distance in range(1, min(size, reach + 1)):
        weight = math.exp(-distance * distance / (2 * sigma * sigma))
        pad = [0, 0] * (board.dim() - axis - 1)
        length = size - distance
        out = out + weight * F.pad(board.narrow(axis, 0, length), [*pad, distance, 0])
        out = out + weight * F.pad(board.narrow(axis, distance, length), [*pad, 0, distance])
    return out
