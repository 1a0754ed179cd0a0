"""Token merging: average similar tokens before an operation, and give all of them its result.

Source: ToMe for diffusion (arXiv 2303.17604), on any set of tokens. A sample does not depend on the rest of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.ops.destinations import Destinations
from tokdyn.ops.matching import pairs
from tokdyn.ops.precision import exact


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


def merged_away(length: int, stay: int, ratio: float) -> int:
    """Count the rows of a sample that are merged into others: a ratio of all, but at most those that need not stay."""
    return min(int(length * ratio), max(0, length - stay))


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
    merged = [merged_away(length, stay, each) for length, stay, each in zip(lengths, into.stay, ratios, strict=True)]
    source, place = pairs(metric, lengths, into, merged)
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
    batch, metric, merged = len(lengths), metric.detach(), [0] * len(lengths)
    both = []
    for rows, into in parts:
        count = len(rows) // batch
        away = [merged_away(count, stay, ratio) for stay in into.stay]
        found = pairs(metric.index_select(0, rows), [count] * batch, into, away)
        both.append([rows.index_select(0, each) for each in found])
        merged = [before + more for before, more in zip(merged, away, strict=True)]
    source, place = (torch.cat(each) for each in zip(*both, strict=True))
    place, order = place.sort(stable=True)
    return _plan(source.index_select(0, order), place, lengths, merged)


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


def merge(x: Tensor, plan: Merging, size: Tensor | None = None) -> Tensor:
    """Average the rows that a plan merges.

    Args:
        x: (T, D).
        plan: from `match`.
        size: (T,) weights of the rows, as passed to `match`; None weighs them equally.

    Returns:
        (M, D), in the type of x.
    """
    weight = None if size is None else size.to(x).index_select(0, plan.order)
    # mode="mean" would divide by integers, which takes the CPU longer than the sum
    total = F.embedding_bag(plan.order, x, plan.start, mode="sum", per_sample_weights=weight)
    return total / plan.size.to(x)[:, None]


def unmerge(y: Tensor, plan: Merging) -> Tensor:
    """Give every row the result of its merged row: (M, D) to (T, D)."""
    return y.index_select(0, plan.slot)
