"""Token merging: similar tokens are averaged before an operation and get its result back after it.

Source: ToMe for diffusion (arXiv 2303.17604), on any set of tokens. A sample does not depend on its batch mates.
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
from tokdyn.ops.dispatch import has_cpu_form
from tokdyn.ops.precision import exact, halves_multiply_slowly


@dataclass(frozen=True)
class Merging:
    """Which rows are averaged into which.

    Attributes:
        slot: (T,) int64, the merged row of every row, in [0, M).
        keep: (M,) int64, the row that each merged row lies at: unmerged rows and destinations, in their own order.
        source: (T - M,) int64, the rows that were merged into others.
        order: (T,) int64, all rows, so that those of one merged row are neighbours.
        start: (M,) int64, where in that order the rows of each merged row begin.
        size: (M,) fp32, how many rows, or how much of the given sizes, each merged row stands for.
        lengths: merged rows of each sample, M in all.
        before: rows of each sample, T in all.
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
        """The plan of one sample."""
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
    """One plan for the samples of several plans, one after the other."""
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
    """Rows of a sample that are merged into others: the ratio of its rows, but never one of possible destinations."""
    return min(int(length * ratio), max(0, length - buckets))


def match(
    metric: Tensor,
    lengths: Sequence[int],
    into: Destinations,
    ratio: float | Sequence[float],
    size: Tensor | None = None,
) -> Merging:
    """Merge the rows that are most similar to their most similar destination (cosine).

    Args:
        metric: (T, D), what is compared; rows sample after sample. No gradient comes back to it.
        lengths: rows of each sample.
        into: from `destinations`.
        ratio: share of a sample's rows to merge away, in [0, 1), or one for each; at most what is no destination.
        size: (T,) how many tokens each row stands for already; None is one each.

    Returns:
        The plan. It needs no host synchronisation.
    """
    ratios = [ratio] * len(lengths) if isinstance(ratio, (int, float)) else list(ratio)
    for each in ratios:
        if not 0.0 <= each < 1.0:
            raise InputError(f"the ratio is {each}, expected a share of the tokens in [0, 1).")
    buckets = into.table.shape[1]
    away = [merged_away(length, buckets, each) for length, each in zip(lengths, ratios, strict=True)]
    left = tuple(length - gone for length, gone in zip(lengths, away, strict=True))
    rows = torch.arange(len(metric), device=metric.device)
    source = place = rows[:0]
    if any(away):
        metric = metric.detach()
        metric = metric.float() if halves_multiply_slowly(metric) else metric
        if len(set(zip(lengths, away, strict=True))) == 1:
            source, place = _match_equal(metric, lengths[0], into, away[0])
        else:
            source, place = _match_ragged(metric, lengths, into, away)
    kept = torch.ones_like(into.mask).index_fill(0, source, False)
    keep = torch.nonzero_static(kept, size=sum(left)).squeeze(1)
    slot = (kept.cumsum(0) - 1).index_select(0, rows.index_copy(0, source, place))
    # Sources come sorted by destination: behind each merged row's own row, and behind those of all rows before it.
    behind = slot.index_select(0, source) + rows[: len(source)] + 1
    start = torch.nonzero_static(torch.ones_like(kept).index_fill(0, behind, False), size=sum(left)).squeeze(1)
    order = torch.empty_like(rows).index_copy(0, behind, source).index_copy(0, start, keep)
    weight = torch.ones_like(rows, dtype=torch.float32) if size is None else exact(size)
    total = weight.index_select(0, keep).index_add(0, slot.index_select(0, source), weight.index_select(0, source))
    return Merging(slot, keep, source, order, start, total, left, tuple(lengths))


def _match_equal(metric: Tensor, length: int, into: Destinations, away: int) -> tuple[Tensor, Tensor]:
    """The merged rows and where they go, sorted by where they go, for samples of equal length."""
    batch, buckets = into.table.shape
    table = _filled(into.table)
    places, inverse = _unit(metric, table)
    if into.others is None:
        candidates = torch.arange(batch * length, device=metric.device).view(batch, length)
    else:
        candidates = into.others
        metric = metric.index_select(0, candidates.flatten())
        inverse = inverse.index_select(0, candidates.flatten())
    best, column = largest(metric.view(batch, candidates.shape[1], -1) @ places.view(batch, buckets, -1).mT)
    best = best * inverse.view_as(best)
    if into.others is None:  # destinations stay
        best = best.masked_fill(into.mask.view_as(best), -math.inf)
    top = best.topk(away, dim=-1, sorted=False).indices
    place, order = table.gather(1, column.gather(1, top)).sort(dim=1)
    return candidates.gather(1, top.gather(1, order)).flatten(), place.flatten()


def _match_ragged(
    metric: Tensor, lengths: Sequence[int], into: Destinations, away: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The same for samples of different length, one after the other."""
    table = _filled(into.table)
    places, inverse = _unit(metric, table)
    sources, targets, first = [], [], 0
    split = list(lengths)
    for rows, scale, mask, unit, place, gone in zip(
        metric.split_with_sizes(split), inverse.split_with_sizes(split), into.mask.split_with_sizes(split),
        places.split_with_sizes([table.shape[1]] * len(table)), table, away, strict=True,
    ):  # fmt: skip
        if gone:
            best, column = largest(rows @ unit.mT)
            best = (best * scale).masked_fill(mask, -math.inf)
            top = best.topk(gone, sorted=False).indices
            target, order = place.index_select(0, column.index_select(0, top)).sort()
            sources.append(top.index_select(0, order) + first)
            targets.append(target)
        first += len(rows)
    return torch.cat(sources), torch.cat(targets)


def _filled(table: Tensor) -> Tensor:
    """The table with another destination of the sample in the place of those that are missing: nobody sees it twice."""
    return torch.where(table < 0, table.amax(dim=1, keepdim=True).clamp(min=0), table)


def _unit(metric: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """(B * K, D) destinations of length one, and (T,) one over the length of every row.

    Only the destinations are scaled: which one is most similar does not depend on the length of the row itself.
    """
    inverse = torch.linalg.vector_norm(metric, dim=-1).clamp(min=1e-12).reciprocal()
    index = table.flatten()
    return metric.index_select(0, index) * inverse.index_select(0, index)[:, None], inverse


@has_cpu_form
def largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest of (..., K) scores and its index, both (...)."""
    best, place = scores.max(dim=-1)
    return best, place


def merge(x: Tensor, plan: Merging, size: Tensor | None = None) -> Tensor:
    """Average rows by a plan.

    Args:
        x: (T, D).
        plan: the plan.
        size: (T,) weights of the rows, as given to `match`; None weighs them equally.

    Returns:
        (M, D), the type of x.
    """
    if size is None:
        return F.embedding_bag(plan.order, x, plan.start, mode="mean")
    weight = size.to(x).index_select(0, plan.order)
    total = F.embedding_bag(plan.order, x, plan.start, mode="sum", per_sample_weights=weight)
    return total / plan.size.to(x)[:, None]


def unmerge(y: Tensor, plan: Merging) -> Tensor:
    """Give every row the result of its merged row: (M, D) to (T, D)."""
    return y.index_select(0, plan.slot)
