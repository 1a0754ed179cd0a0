"""Smoothing on the CPU, over lists of neighbours."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.ops import torch_private
from tokdyn.ops.dechunk import EPS, P_MIN
from tokdyn.ops.dechunk import smooth as plain_smooth
from tokdyn.ops.dispatch import cpu_form, differentiable_gradients
from tokdyn.tokens import Packing, cells


@cpu_form(plain_smooth)
def smooth(features: Tensor, kept: Tensor, packing: Packing, sigma: float) -> Tensor | None:
    """Smooth by one weighted bag of neighbours per token, whose number is known at once on the CPU."""
    if len(packing.grid) == 3:
        return None
    p = kept.double()  # one element per token: exact weights halve the error of the sums at no cost
    token, neighbour, kernel, starts = _neighbours(packing, _reach(features.dtype, p.detach(), sigma), sigma)
    weight = kernel * p.index_select(0, neighbour)
    share = (1 - p) / (torch.zeros_like(p).index_add(0, token, weight) + EPS)
    weight = (weight * share.index_select(0, token)).to(features.dtype)
    if None in (torch_private.bag_backward, torch_private.bag_weights_backward):
        smoothed = F.embedding_bag(neighbour, features, starts, mode="sum", per_sample_weights=weight)
    else:
        smoothed = _WeightedSums.apply(features, weight, neighbour, starts, token)
    return torch.addcmul(smoothed, features, kept[:, None])


class _WeightedSums(torch.autograd.Function):
    """`embedding_bag` of weighted rows and its gradients, with a second derivative."""

    @staticmethod
    def forward(context, features, weight, neighbour, starts, token):  # type: ignore[no-untyped-def]
        out, *bags = torch.embedding_bag(features, neighbour, starts, False, 0, False, weight)
        context.save_for_backward(features, weight, neighbour, starts, token, *bags)
        return out

    @staticmethod
    def backward(context, gradient):  # type: ignore[no-untyped-def]
        features, weight, neighbour, starts, token, *bags = context.saved_tensors
        to_features = to_weight = None
        if torch.is_grad_enabled():
            arguments = features, weight, neighbour, token
            to_features, to_weight, *_ = differentiable_gradients(_plain_sums, arguments, gradient)
            return to_features, to_weight, None, None, None
        if context.needs_input_grad[0]:
            to_features = torch_private.bag_backward(
                gradient, neighbour, starts, *bags, len(features), False, 0, False, weight, -1
            )
        if context.needs_input_grad[1]:
            to_weight = torch_private.bag_weights_backward(gradient, features, neighbour, starts, bags[0], 0, -1)
        return to_features, to_weight, None, None, None


def _plain_sums(features: Tensor, weight: Tensor, neighbour: Tensor, token: Tensor) -> Tensor:
    return torch.zeros_like(features).index_add(0, token, weight[:, None] * features.index_select(0, neighbour))


def _reach(dtype: torch.dtype, p: Tensor, sigma: float) -> Tensor:
    """Return the distance (T,) in cells from which a kept token of weight 1 no longer counts beside a weight of p."""
    least = p.nan_to_num(P_MIN).clamp(min=P_MIN)  # if p is NaN, so is the result, however far we look
    return (least * (torch.finfo(dtype).eps / 4)).log_().mul_(-2 * sigma * sigma).sqrt_()


def _neighbours(packing: Packing, reach: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """List the pairs of kept tokens within the first one's reach; each token is paired with itself too.

    Tokens are packed in raster order, so the neighbours in one line of the grid are consecutive packed rows, found from
    the number of tokens before the ends of the line.

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


def disc(radius: float, sizes: Sequence[int]) -> tuple[list[tuple[int, ...]], list[float]]:
    """List the integer offsets within a radius that a grid of these sizes has room for, and their squared lengths."""
    offsets: list[tuple[int, ...]] = [()]
    for size in sizes:
        reach = min(math.floor(radius), size - 1)
        offsets = [(*offset, step) for offset in offsets for step in range(-reach, reach + 1)]
    inside = [offset for offset in offsets if sum(step * step for step in offset) <= radius * radius]
    return inside, [float(sum(step * step for step in offset)) for offset in inside]
