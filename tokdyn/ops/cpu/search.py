"""Minima and maxima on the CPU, where values can be looked at while they are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from tokdyn.ops import merging, nearest
from tokdyn.ops.dispatch import cpu_form

_GROUP, _MANY = 64, 512  # scores whose largest is found at once, and from how many scores that is faster


@cpu_form(nearest.along_axis)
def along_axis(keys: Tensor, axis: int, count: int) -> Tensor | None:
    """Shift the keys along the axis, as far as a cell that is still farther away could win."""
    best = keys.clone()
    for distance in range(1, keys.shape[axis]):
        if int(best.max()) < distance * distance * count:
            break
        nearest.shift_minimum(best, keys, axis, distance, count)
    return best


@cpu_form(merging.largest)
def largest(scores: Tensor) -> tuple[Tensor, Tensor] | None:
    """Take the maximum over groups, then look into one of them.

    The maximum together with its index is slow on CPU, the maximum alone is not.
    """
    many = scores.shape[-1]
    if many < _MANY or many % _GROUP:
        return None
    groups = scores.reshape(-1, many // _GROUP, _GROUP)
    best, group = groups.amax(dim=-1).max(dim=-1)
    first = torch.arange(len(groups), device=scores.device) * (many // _GROUP)
    inside = groups.flatten(0, 1).index_select(0, first + group).max(dim=-1).indices
    return best.view(scores.shape[:-1]), (inside + group * _GROUP).view(scores.shape[:-1])
