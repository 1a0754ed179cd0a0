"""Find the destination that every row is most similar to, by cosine, and choose the rows that are merged.

Rows are compared with all destinations of their sample, or with those of their window (`tokdyn.ops.windows`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokdyn.ops.destinations import Destinations
from tokdyn.ops.precision import halves_multiply_slowly
from tokdyn.ops.windows import Windows

_PRODUCTS = 2**26  # products of rows and destinations that are held at a time: 256 MiB in fp32
_GATHERED = 2**24  # elements of rows that are gathered at a time: 64 MiB in fp32
_RUN = 32  # neighbouring channels that are read together: a cache line in bf16


def some_channels(metric: Tensor, count: int | None) -> Tensor:
    """Select about `count` of the channels of rows (T, D), in evenly spaced runs; all if it is None or at least D.

    The cosine of some of the channels stands for that of all. Reading runs costs memory traffic in proportion.
    """
    width = metric.shape[1]
    if count is None or count >= width:
        return metric
    run = min(_RUN, count)
    runs = max(1, count // run)
    return metric.detach().unfold(1, run, width // runs)[:, :runs].reshape(len(metric), runs * run)


def pairs(metric: Tensor, lengths: Sequence[int], into: Destinations, merged: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the rows to merge, a number of each sample, and their destinations, sorted by destination.

    Args:
        metric: (T, D), the features to compare, sample after sample. They get no gradient.
        lengths: rows of each sample.
        into: the destinations.
        merged: rows of each sample to merge.
    """
    if not any(merged):
        empty = torch.empty(0, dtype=torch.int64, device=metric.device)
        return empty, empty
    metric = metric.detach()
    if into.windows is not None:
        return _match_windows(metric, into.windows, merged)
    metric = metric.float() if halves_multiply_slowly(metric) else metric
    if len(set(zip(lengths, merged, strict=True))) == 1:
        return _match_equal(metric, lengths[0], into, merged[0])
    return _match_ragged(metric, lengths, into, merged)


def _match_windows(metric: Tensor, windows: Windows, merged: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Match the rows of each window; some windows at a time, so that no copy of all rows is held."""
    batch, count, room = windows.rows.shape
    rows, table = windows.rows.flatten(0, 1), windows.table.flatten(0, 1)
    held = max(1, min(_PRODUCTS // max(1, room * table.shape[1]), _GATHERED // max(1, room * metric.shape[1])))
    found = []
    parts = range(0, len(rows), held)
    for some, places in ((rows[at : at + held], table[at : at + held]) for at in parts):
        own, unit = (_gathered(metric, index) for index in (some.clamp(min=0), places))
        unit = unit * _inverse(unit)[..., None]
        best, column = (own @ unit.mT).max(dim=-1)
        found.append((best * _inverse(own), places.gather(1, column)))
    best, target = (torch.cat(each).view(batch, count * room) for each in zip(*found, strict=True))
    rows = rows.view(batch, count * room)
    best = best.masked_fill(rows < 0, -math.inf)
    if len(set(merged)) == 1:
        top = best.topk(merged[0], dim=-1, sorted=False).indices
        place, order = target.gather(1, top).sort(dim=1)
        return rows.gather(1, top.gather(1, order)).flatten(), place.flatten()
    chosen = [each.topk(number, sorted=False).indices for each, number in zip(best, merged, strict=True)]
    place, order = torch.cat([own[top] for own, top in zip(target, chosen, strict=True)]).sort()
    source = torch.cat([own[top] for own, top in zip(rows, chosen, strict=True)])
    return source.index_select(0, order), place


def _gathered(metric: Tensor, index: Tensor) -> Tensor:
    """Gather rows (T, D) by an index (G, S) to (G, S, D), in a type whose products are fast."""
    rows = metric.index_select(0, index.flatten()).view(*index.shape, -1)
    return rows.float() if halves_multiply_slowly(rows) else rows


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
    inverse = _inverse(metric)
    index = table.flatten()
    return metric.index_select(0, index) * inverse.index_select(0, index)[:, None], inverse


def _inverse(rows: Tensor) -> Tensor:
    """Return one over the length of every row, (..., D) to (...)."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1)
    return length.clamp(min=1e-12).reciprocal()
