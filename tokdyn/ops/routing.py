"""Routing: kept sets from boundary probabilities, tail drop, the straight-through gate and the ratio loss.

Source: Dynamic Chunking Diffusion Transformer, arXiv 2603.06351; H-Net, arXiv 2507.07955.
"""

from __future__ import annotations

import math
from typing import Any, SupportsFloat

import torch
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.ops.dispatch import synchronises


def select(probability: Tensor, force_ends: bool = False) -> tuple[Tensor, Tensor]:
    """Select the natural kept set: p > 0.5, strictly, and at least one cell.

    Args:
        probability: (B, N) boundary probability.
        force_ends: give the first and the last cell p = 1, as the official code does.

    Returns:
        probability (B, N), with p = 1 at forced cells, and keep (B, N) bool. A sample in which nothing exceeds 0.5
        keeps its most probable cell.
    """
    if force_ends:
        ends = torch.zeros(probability.shape[1], dtype=torch.bool, device=probability.device)
        ends[0] = ends[-1] = True
        probability = probability.masked_fill(ends, 1.0)
        return probability, probability > 0.5
    keep = probability > 0.5
    best = torch.zeros_like(keep).scatter_(1, probability.argmax(dim=1, keepdim=True), True)
    return probability, torch.where(keep.any(dim=1, keepdim=True), keep, best)


def tail_drop(probability: Tensor, keep: Tensor, fraction: float | Tensor) -> Tensor:
    """Drop the least probable floor(n f) of the n kept tokens of each sample, but never all (arXiv 2603.06351 v2).

    Ties are broken in raster order, so the kept set of a larger f is a subset of that of a smaller one. n f is computed
    in fp32 whatever the other types, so that a number and a tensor of it drop the same tokens.

    Args:
        probability: (B, N) boundary probability.
        keep: (B, N) bool, the natural kept set.
        fraction: f in [0, 1], or a (B,) tensor with one for each sample (Lite-CFG). Entries of a tensor on an
            accelerator are clamped to [0, 1], since checking them would make the host wait.

    Returns:
        (B, N) bool. At f = 0 it is `keep` itself.

    Raises:
        InputError: a fraction lies outside [0, 1], or is neither a number nor a (B,) tensor.
    """
    batch = keep.shape[0]
    if isinstance(fraction, Tensor):
        if fraction.shape not in ((), (1,), (batch,)):
            raise InputError(f"tail_drop has shape {tuple(fraction.shape)}, expected a float or ({batch},).")
        if not synchronises(fraction) and not bool(((fraction >= 0) & (fraction <= 1)).all()):
            raise InputError(f"tail_drop is {fraction.tolist()}, expected fractions between 0 and 1.")
        share = fraction.to(probability.device, torch.float32).reshape(-1, 1)
    else:
        if not isinstance(fraction, SupportsFloat):
            raise InputError(f"tail_drop is a {type(fraction).__name__}, expected a number or a ({batch},) tensor.")
        if not 0.0 <= float(fraction) <= 1.0:
            raise InputError(f"tail_drop is {fraction}, expected a fraction between 0 and 1.")
        if fraction == 0.0:
            return keep
        share = torch.full((1, 1), float(fraction), dtype=torch.float32, device=probability.device)
    count = keep.sum(dim=1, keepdim=True)
    dropped = torch.minimum((count * share).floor().long().clamp_(min=0), count - 1)
    order = probability.masked_fill(~keep, float("inf")).argsort(dim=1, stable=True)
    first = torch.arange(keep.shape[1], device=keep.device) < dropped
    return keep & ~torch.zeros_like(keep).scatter_(1, order, first)


def tail_kept(kept: int, fraction: float) -> int:
    """Count the tokens of a sample that `tail_drop` leaves, for a number that is known on the host.

    Args:
        kept: n, tokens before tail drop.
        fraction: f in [0, 1].

    Returns:
        n - floor(n f), at least 1; n f in fp32, as in `tail_drop`.
    """
    return kept - min(math.floor(_fp32(kept * _fp32(fraction))), kept - 1)


def _fp32(x: float) -> float:
    """Round to fp32, without a tensor that torch.compile would trace."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)


def most_probable(probability: Tensor, counts: tuple[int, ...]) -> Tensor:
    """Select the most probable cells of each sample; larger sets contain smaller ones, as ties go in raster order.

    Args:
        probability: (B, N).
        counts: cells to select in each sample, 1 to N, known on the host.

    Returns:
        (B, M) int64 with M the largest count: the selected cells in raster order, then cells that only fill up.
    """
    cell = probability.shape[1]
    order = probability.argsort(dim=1, descending=True, stable=True)[:, : max(counts)]
    if len(set(counts)) == 1:
        return order.sort(dim=1).values
    limit = torch.tensor(counts, device=order.device)[:, None]
    surplus = torch.arange(order.shape[1], device=order.device) >= limit
    return (order + surplus * cell).sort(dim=1).values.remainder(cell)


class _StraightThrough(torch.autograd.Function):
    """The identity, with the gradients of `features * probability` at a probability of 1."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, probability: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (features,) = ctx.saved_tensors
        with torch.autocast(features.device.type, enabled=False):
            return grads[0], torch.linalg.vecdot(grads[0], features)


def straight_through(features: Tensor, probability: Tensor) -> Tensor:
    """Apply `out * STE(p)`: the gate is 1 forward, and gives p the gradient of a gate p (arXiv 2507.07955, eq. 7-9).

    Args:
        features: (..., D).
        probability: (...), the probability of the decision taken: p where kept, 1 - p elsewhere.

    Returns:
        (..., D), equal to `features`.
    """
    out: Tensor = _StraightThrough.apply(features, probability)
    return out


def group_means(values: Tensor, size: int | None = None) -> Tensor:
    """Return for every sample the mean of its group of consecutive samples.

    Args:
        values: (B,).
        size: samples of a group; None is all of them. The last group may be smaller.

    Returns:
        (B,).
    """
    size = min(size or len(values), len(values))
    whole = len(values) // size * size
    means = values[:whole].view(-1, size).mean(dim=1).repeat_interleave(size)
    if whole == len(values):
        return means
    return torch.cat([means, values[whole:].mean().expand(len(values) - whole)])


def ratio_loss(
    probability: Tensor, natural_keep: Tensor, target: float, group_size: int | None = None, share: Tensor | None = None
) -> Tensor:
    """Compute `N / (N - 1) ((1 - F) (1 - G) + (N - 1) F G)` (arXiv 2507.07955, eq. 10).

    F is the mean kept share and G the mean probability. F has no gradient, and dL/dG is proportional to `N F - 1`, so
    the loss drives the kept share to 1/N.

    Args:
        probability: (B, N) boundary probability.
        natural_keep: (B, N) bool, the kept set before tail drop.
        target: N > 1, tokens per kept token.
        group_size: samples that F and G are averaged over; None is the whole batch. The last group may be smaller;
            groups are weighted by their number of samples.
        share: (B,) F of the group that each sample belongs to, if the batch is a part of a larger one whose groups do
            not end where it ends; the mean of the losses of all parts is then the loss of the larger one. None
            computes it.

    Returns:
        A scalar, fp32; 1 for F = G = 1/N.

    Raises:
        InputError: target is not above 1, or group_size is not positive.
    """
    if target <= 1.0:
        raise InputError(f"target is {target}, expected more than 1 token per kept token.")
    if group_size is not None and group_size < 1:
        raise InputError(f"group_size is {group_size}, expected at least 1 sample.")
    f = group_means(natural_keep.float().mean(dim=1), group_size) if share is None else share
    g = probability.float().mean(dim=1)  # the loss is linear in it, so that samples may stand for their group
    return ((1 - f) * (1 - g) + (target - 1) * f * g).mean() * (target / (target - 1))
