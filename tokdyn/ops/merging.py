"""Token merging: average similar tokens before an operation, and give all of them its result.

Source: ToMe for diffusion (arXiv 2303.17604), on any set of tokens. A sample does not depend on the rest of its batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.ops.destinations import Destinations
from tokdyn.ops.precision import exact, halves_multiply_slowly

_PRODUCTS = 2**26  # products of rows and destinations that are held at a time: 256 MiB in fp32


@dataclass(frozen=True)
class Merging:
    """A plan of which rows are averaged into which.

    Attributes:
        slot: (T,) int64, the merged row of every row, in [0, M).
        keep: (M,) int64, the row that each merged row takes the place of: unmerged rows and destinations, in order.
        source: (T - M,) int64, the rows that are merged into others.
        order: (T,) int64, all rows, those of a merged row next to each other.
        start: (M,) int64, where the rows of each merged row begin in that order.
        size: (M,) fp32, the number of rows, or the sum of their sizes, that each merged row stands for.
        lengths: merged rows of each sample, M in total.
        before: rows of each sample, T in total.
    """

    slot: Tensor
    keep: Tensor
    source: Tensor
    order: Tensor
    start: Tensor
    size: Tensor
    lengths: tuple[int, ...]
    before: tuple[int, ...]

    def sample(self, place: int) -> Merging:
        """Return the plan of one sample."""
        row, left = sum(self.before[:place]), sum(self.lengths[:place])
        rows, merged = self.before[place], self.lengths[place]

        def own(x: Tensor, first: int, count: int) -> Tensor:
            return x[first : first + count]

        return Merging(
            own(self.slot, row, rows) - left,
            own(self.keep, left, merged) - row,
            own(self.source, row - left, rows - merged) - row,
            own(self.order, row, rows) - row,
            own(self.start, left, merged) - row,
            own(self.size, left, merged),
            (merged,),
            (rows,),
        )


def joined(plans: Sequence[Merging]) -> Merging:
    """Concatenate plans into one for the samples of all of them."""
    rows, left = [0], [0]
    for plan in plans:
        rows.append(rows[-1] + len(plan.slot))
        left.append(left[-1] + len(plan.keep))

    def together(name: str, first: Sequence[int]) -> Tensor:
        return torch.cat([getattr(plan, name) + add for plan, add in zip(plans, first, strict=False)])

    return Merging(
        together("slot", left),
        together("keep", rows),
        together("source", rows),
        together("order", rows),
        together("start", rows),
        torch.cat([plan.size for plan in plans]),
        tuple(length for plan in plans for length in plan.lengths),
        tuple(length for plan in plans for length in plan.before),
    )


def merged_away(length: int, buckets: int, ratio: float) -> int:
    """Count the rows of a sample that are merged into others: a ratio of all, but at most those not destinations."""
    return min(int(length * ratio), max(0, length - buckets))


def match(
    metric: Tensor,
    lengths: Sequence[int],
    into: Destinations,
    ratio: float | Sequence[float],
    size: Tensor | None = None,
) -> Merging:
    """Plan to merge the rows that are most similar to their most similar destination, by cosine.

    Args:
        metric: (T, D), the features to compare, sample after sample. They get no gradient.
        lengths: rows of each sample.
        into: the destinations, from `destinations`.
        ratio: share of the rows to merge into others, in [0, 1), for all samples or one for each.
        size: (T,) how many tokens each row stands for already; None is 1.

    Returns:
        The plan, made without a synchronisation with the host.

    Raises:
        InputError: a ratio lies outside [0, 1).
    """
    ratios = [ratio] * len(lengths) if isinstance(ratio, (int, float)) else list(ratio)
    for each in ratios:
        if not 0.0 <= each < 1.0:
            raise InputError(f"the ratio is {each}, expected a share of the tokens in [0, 1).")
    merged = [merged_away(length, into.table.shape[1], each) for length, each in zip(lengths, ratios, strict=True)]
    source, place = _pairs(metric, lengths, into, merged)
    return _plan(source, place, lengths, merged, size)


def match_parts(
    metric: Tensor, lengths: Sequence[int], parts: Sequence[tuple[Tensor, Destinations]], ratio: float
) -> Merging:
    """Plan to merge the rows of each of several parts among themselves; rows that belong to no part stay as they are.

    Args:
        metric: (T, D), the features to compare, sample after sample. They get no gradient.
        lengths: rows of each sample.
        parts: of each part its rows, (P,) int64 and as many for every sample, and its destinations among them.
        ratio: share of the rows of every part to merge into others, in [0, 1).

    Returns:
        The plan, made without a synchronisation with the host.
    """
    batch, metric, merged = len(lengths), metric.detach(), 0
    pairs = []
    for rows, into in parts:
        count = len(rows) // batch
        away = merged_away(count, into.table.shape[1], ratio)
        found = _pairs(metric.index_select(0, rows), [count] * batch, into, [away] * batch)
        pairs.append([rows.index_select(0, each) for each in found])
        merged += away
    source, place = (torch.cat(each) for each in zip(*pairs, strict=True))
    place, order = place.sort(stable=True)
    return _plan(source.index_select(0, order), place, lengths, [merged] * batch)


def _pairs(metric: Tensor, lengths: Sequence[int], into: Destinations, merged: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the rows to merge, a number of each sample, and their destinations, sorted by destination."""
    if not any(merged):
        empty = torch.empty(0, dtype=torch.int64, device=metric.device)
        return empty, empty
    metric = metric.detach()
    metric = metric.float() if halves_multiply_slowly(metric) else metric
    if len(set(zip(lengths, merged, strict=True))) == 1:
        return _match_equal(metric, lengths[0], into, merged[0])
    return _match_ragged(metric, lengths, into, merged)


def _plan(
    source: Tensor, place: Tensor, lengths: Sequence[int], merged: Sequence[int], size: Tensor | None = None
) -> Merging:
    """Build the plan from the rows to merge and their destinations, sorted by destination."""
    left = tuple(length - count for length, count in zip(lengths, merged, strict=True))
    rows = torch.arange(sum(lengths), device=source.device)
    kept = torch.ones_like(rows, dtype=torch.bool).index_fill(0, source, False)
    keep = torch.nonzero_static(kept, size=sum(left)).squeeze(1)
    slot = (kept.cumsum(0) - 1).index_select(0, rows.index_copy(0, source, place))
    # Sources come sorted by destination: behind each merged row's own row, and behind those of all rows before it.
    behind = slot.index_select(0, source) + rows[: len(source)] + 1
    start = torch.nonzero_static(torch.ones_like(kept).index_fill(0, behind, False), size=sum(left)).squeeze(1)
    order = torch.empty_like(rows).index_copy(0, behind, source).index_copy(0, start, keep)
    weight = torch.ones_like(rows, dtype=torch.float32) if size is None else exact(size)
    total = weight.index_select(0, keep).index_add(0, slot.index_select(0, source), weight.index_select(0, source))
    return Merging(slot, keep, source, order, start, total, left, tuple(lengths))


def _match_equal(metric: Tensor, length: int, into: Destinations, merged: int) -> tuple[Tensor, Tensor]:
    """Match samples of equal length; return the rows to merge and their destinations, sorted by destination."""
    batch, buckets = into.table.shape
    table = _filled(into.table)
    places, inverse = _unit(metric, table)
    if into.others is None:
        candidates = torch.arange(batch * length, device=metric.device).view(batch, length)
    else:
        candidates = into.others
        metric = metric.index_select(0, candidates.flatten())
        inverse = inverse.index_select(0, candidates.flatten())
    best, column = _most_similar(metric.view(batch, candidates.shape[1], -1), places.view(batch, buckets, -1))
    best = best * inverse.view_as(best)
    if into.others is None:  # destinations stay
        best = best.masked_fill(into.mask.view_as(best), -math.inf)
    top = best.topk(merged, dim=-1, sorted=False).indices
    place, order = table.gather(1, column.gather(1, top)).sort(dim=1)
    return candidates.gather(1, top.gather(1, order)).flatten(), place.flatten()


def _match_ragged(
    metric: Tensor, lengths: Sequence[int], into: Destinations, merged: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Match samples of different length, one after the other; return what `_match_equal` does."""
    table = _filled(into.table)
    places, inverse = _unit(metric, table)
    sources, targets, first = [], [], 0
    split = list(lengths)
    for rows, scale, mask, unit, place, count in zip(
        metric.split_with_sizes(split), inverse.split_with_sizes(split), into.mask.split_with_sizes(split),
        places.split_with_sizes([table.shape[1]] * len(table)), table, merged, strict=True,
    ):  # fmt: skip
        if count:
            best, column = (each.squeeze(0) for each in _most_similar(rows[None], unit[None]))
            best = (best * scale).masked_fill(mask, -math.inf)
            top = best.topk(count, sorted=False).indices
            target, order = place.index_select(0, column.index_select(0, top)).sort()
            sources.append(top.index_select(0, order) + first)
            targets.append(target)
        first += len(rows)
    return torch.cat(sources), torch.cat(targets)


def _most_similar(rows: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest product of every row (B, S, D) with a destination (B, K, D), and which it is, (B, S) each.

    The products of a long video would need gigabytes, so they are made for some of the rows at a time.
    """
    parts = max(1, math.ceil(rows.shape[0] * rows.shape[1] * places.shape[1] / _PRODUCTS))
    best, column = zip(*((some @ places.mT).max(dim=-1) for some in rows.chunk(parts, dim=1)), strict=True)
    return (best[0], column[0]) if len(best) == 1 else (torch.cat(best, dim=1), torch.cat(column, dim=1))


def _filled(table: Tensor) -> Tensor:
    """Replace missing destinations by another one of the sample, which changes no maximum."""
    return torch.where(table < 0, table.amax(dim=1, keepdim=True).clamp(min=0), table)


def _unit(metric: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return destinations (B * K, D) scaled to length one, and one over the length of every row, (T,).

    Rows are not scaled: which destination is most similar to a row does not depend on its length.
    """
    inverse = torch.linalg.vector_norm(metric, dim=-1).clamp(min=1e-12).reciprocal()
    index = table.flatten()
    return metric.index_select(0, index) * inverse.index_select(0, index)[:, None], inverse


def merge(x: Tensor, plan: Merging, size: Tensor | None = None) -> Tensor:
    """Average the rows that a plan merges.

    Args:
        x: (T, D).
        plan: from `match`.
        size: (T,) weights of the rows, as passed to `match`; None weighs them equally.

    Returns:
        (M, D), in the type of x.
    """
    if size is None:
        return F.embedding_bag(plan.order, x, plan.start, mode="mean")
    weight = size.to(x).index_select(0, plan.order)
    total = F.embedding_bag(plan.order, x, plan.start, mode="sum", per_sample_weights=weight)
    return total / plan.size.to(x)[:, None]


def unmerge(y: Tensor, plan: Merging) -> Tensor:
    """Give every row the result of its merged row: (M, D) to (T, D)."""
    return y.index_select(0, plan.slot)
