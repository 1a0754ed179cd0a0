"""Token merging: similar tokens are averaged before an operation and get its result back after it.

Source: ToMe for diffusion (arXiv 2303.17604), with buckets of cells in place of the 2x2 cells of a full grid, so that
it works on any set of tokens; on a full grid the two are the same. A sample does not depend on its batch mates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.ops.hashing import mix
from tokdyn.ops.precision import exact
from tokdyn.tokens import Grid, cells


@dataclass(frozen=True)
class Destinations:
    """The rows that others may be merged into, at most one for each of K buckets.

    Attributes:
        table: (B, K) int64, the row of each bucket's destination, -1 where the bucket holds no row.
        mask: (T,) bool, which rows they are.
        full: every cell of the grid has a row, so that no bucket is empty.
    """

    table: Tensor
    mask: Tensor
    full: bool


@dataclass(frozen=True)
class Merging:
    """Which rows are averaged into which.

    Attributes:
        slot: (T,) int64, the merged row of every row, in [0, M).
        keep: (M,) int64, the row that each merged row lies at: unmerged rows and destinations, in their own order.
        source: (T - M,) int64, the rows that were merged into others.
        size: (M,) fp32, how many rows, or how much of the given sizes, each merged row stands for.
        lengths: merged rows of each sample, M in all.
    """

    slot: Tensor
    keep: Tensor
    source: Tensor
    size: Tensor
    lengths: tuple[int, ...]


def destinations(
    cell: Tensor,
    sample: Tensor,
    batch: int,
    grid: Grid,
    bucket: int | Sequence[int] = 2,
    seed: int | None = None,
    step: int = 0,
    importance: Tensor | None = None,
) -> Destinations:
    """One destination in every bucket of neighbouring cells that holds a token.

    Args:
        cell: (T,) int64, raster index of each row in its own grid.
        sample: (T,) int64, the sample that each row belongs to.
        batch: B.
        grid: 1 to 3 sizes.
        bucket: cells of a bucket along every axis, or along each.
        seed: None takes the first row of a bucket in raster order; a number takes the one with the smallest hash of
            seed, step and cell, the same for every sample.
        step: a number that changes the hash from step to step.
        importance: (T,) takes the most important row of each bucket instead, the first one of equals.

    Returns:
        The destinations of K buckets a sample.

    Raises:
        InputError: a bucket without cells, or one size for each axis was expected.
    """
    sizes = [bucket] * len(grid) if isinstance(bucket, int) else list(bucket)
    if len(sizes) != len(grid) or min(sizes) < 1:
        raise InputError(f"the bucket is {bucket}, expected a positive number of cells for each axis of {grid}.")
    place, rest = torch.zeros_like(cell), cell
    count, stride = 1, 1
    for size, width in zip(reversed(grid), reversed(sizes), strict=True):
        place += rest.remainder(size).div(width, rounding_mode="floor") * stride
        rest = rest.div(size, rounding_mode="floor")
        stride *= -(-size // width)
        count = stride
    place += sample * count
    rows = torch.arange(len(cell), device=cell.device)
    if importance is not None:
        top = importance.new_full((batch * count,), -math.inf).scatter_reduce(0, place, importance, "amax")
        key = torch.where(importance >= top.index_select(0, place), rows, len(cell))
    elif seed is not None:
        key = mix(mix(mix(torch.tensor(seed, device=cell.device)) + step) + cell) * cells(grid) + cell
    else:
        key = rows
    none = torch.iinfo(torch.int64).max
    least = key.new_full((batch * count,), none).scatter_reduce(0, place, key, "amin")
    chosen = key == least.index_select(0, place)
    if importance is not None:
        chosen &= key < len(cell)
    table = rows.new_full((batch * count,), -1).scatter_reduce(0, place, torch.where(chosen, rows, -1), "amax")
    return Destinations(table.view(batch, count), chosen, full=len(cell) == batch * cells(grid))


def merged_away(length: int, buckets: int, ratio: float) -> int:
    """Rows of a sample that are merged into others: the ratio of its rows, but never one of possible destinations."""
    return min(int(length * ratio), max(0, length - buckets))


def match(
    metric: Tensor,
    lengths: Sequence[int],
    into: Destinations,
    ratio: float,
    size: Tensor | None = None,
) -> Merging:
    """Merge the rows that are most similar to their most similar destination (cosine).

    Args:
        metric: (T, D), what is compared; rows sample after sample.
        lengths: rows of each sample.
        into: from `destinations`.
        ratio: share of a sample's rows to merge away, in [0, 1); at most what is no destination.
        size: (T,) how many tokens each row stands for already; None is one each.

    Returns:
        The plan. It needs no host synchronisation.
    """
    if not 0.0 <= ratio < 1.0:
        raise InputError(f"the ratio is {ratio}, expected a share of the tokens in [0, 1).")
    buckets = into.table.shape[1]
    away = [merged_away(length, buckets, ratio) for length in lengths]
    rows = torch.arange(len(metric), device=metric.device)
    target = rows
    source = rows[:0]
    if any(away):
        metric = F.normalize(metric, dim=-1)
        if len(set(lengths)) == 1:
            source, place = _match_equal(metric, lengths[0], into, away[0])
        else:
            source, place = _match_ragged(metric, lengths, into, away)
        target = rows.index_copy(0, source, place)
    kept = torch.ones_like(into.mask).index_fill(0, source, False)
    slot = (kept.cumsum(0) - 1).index_select(0, target)
    left = tuple(length - gone for length, gone in zip(lengths, away, strict=True))
    keep = torch.nonzero_static(kept, size=sum(left)).squeeze(1)
    weight = torch.ones_like(rows, dtype=torch.float32) if size is None else exact(size)
    total = weight.index_select(0, keep).index_add(0, slot.index_select(0, source), weight.index_select(0, source))
    return Merging(slot, keep, source, total, left)


def _match_equal(metric: Tensor, length: int, into: Destinations, away: int) -> tuple[Tensor, Tensor]:
    """The merged rows and where they go, for samples of equal length."""
    table, (batch, buckets) = into.table, into.table.shape
    places = metric.index_select(0, table.clamp(min=0).flatten()).view(batch, buckets, -1)
    if into.full:  # destinations are not compared with each other
        candidates = torch.nonzero_static(~into.mask, size=batch * (length - buckets)).view(batch, -1)
        metric = metric.index_select(0, candidates.flatten())
    else:
        candidates = torch.arange(batch * length, device=metric.device).view(batch, length)
    scores = metric.view(batch, candidates.shape[1], -1) @ places.transpose(1, 2)
    if not into.full:
        scores = scores.masked_fill((table < 0)[:, None] | into.mask.view(batch, length, 1), -math.inf)
    best, column = scores.max(dim=-1)
    top = best.topk(away, dim=-1, sorted=False).indices
    source = candidates.gather(1, top)
    return source.flatten(), table.gather(1, column.gather(1, top)).flatten()


def _match_ragged(
    metric: Tensor, lengths: Sequence[int], into: Destinations, away: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The same for samples of different length, one after the other."""
    sources, targets, first = [], [], 0
    for rows, mask, places, gone in zip(
        metric.split_with_sizes(list(lengths)), into.mask.split_with_sizes(list(lengths)), into.table, away, strict=True
    ):
        if gone:
            scores = rows @ metric.index_select(0, places.clamp(min=0)).T
            scores = scores.masked_fill(places < 0, -math.inf).masked_fill(mask[:, None], -math.inf)
            best, column = scores.max(dim=-1)
            top = best.topk(gone, sorted=False).indices
            sources.append(top + first)
            targets.append(places.index_select(0, column.index_select(0, top)))
        first += len(rows)
    return torch.cat(sources), torch.cat(targets)


def merge(x: Tensor, plan: Merging, size: Tensor | None = None) -> Tensor:
    """Average rows by a plan.

    Args:
        x: (T, D).
        plan: the plan.
        size: (T,) weights of the rows, as given to `match`; None weighs them equally.

    Returns:
        (M, D), the type of x.
    """
    into = plan.slot.index_select(0, plan.source)
    if size is not None:
        x = x * size.to(x)[:, None]
    total = x.index_select(0, plan.keep).index_add(0, into, x.index_select(0, plan.source))
    return total / plan.size.to(x)[:, None]


def unmerge(y: Tensor, plan: Merging) -> Tensor:
    """Give every row the result of its merged row: (M, D) to (T, D)."""
    return y.index_select(0, plan.slot)
