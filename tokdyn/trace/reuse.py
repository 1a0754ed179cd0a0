"""Decide which samples of a step reuse an earlier effect: by the rule of a cache, within the window of its settings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokdyn.methods.feature_cache import FeatureCache
from tokdyn.ops.caching import accumulate, relative_change, rescale
from tokdyn.ops.easycache import predicted_change
from tokdyn.ops.magcache import drift, ratio_at
from tokdyn.trace.memory import Accumulated, BranchMemory
from tokdyn.trace.trajectory import Position


def nothing_accumulated(method: FeatureCache, batch: int, device: torch.device) -> Accumulated:
    """Return what the first step of a trajectory leaves; MagCache's sums stay on the host, where its ratios are."""
    if method.rule == "magcache":
        return Accumulated.nothing(batch, torch.device("cpu"), torch.float64)
    return Accumulated.nothing(batch, device)


def decide(
    method: FeatureCache,
    position: Position,
    branch: BranchMemory,
    indicator: Tensor,
    fresh: Sequence[bool],
    total: Callable[[Tensor], Tensor] | None = None,
) -> list[bool]:
    """Decide for each sample whether it is reused, and update what has accumulated in the memory of its branch.

    Args:
        method: the settings.
        position: the place of the call.
        branch: the memory of the branch, whose indicator is that of the step before; `since` is updated.
        indicator: (B, ...) the indicator of this step.
        fresh: for each sample, whether another image is remembered; such a sample is computed.
        total: adds sums (2, B) up over the processes that have parts of the samples; None if this one has all.

    Raises:
        InputError: the settings need the number of steps, which is unknown.
    """
    steps, count = position.steps, method.num_steps
    if position.num_steps is not None and (count is not None or method.steps is None):
        count = position.num_steps  # what the loop says goes before what was set
    if method.steps is not None:
        listed = [step in method.steps or (count is not None and step >= count - 1) for step in steps]
        return [not (one or other) for one, other in zip(listed, fresh, strict=True)]
    since, window, most = branch.since, method.window(count), method.max_reused
    forced = [
        new or step not in window or (most is not None and reused >= most)
        for new, step, reused in zip(fresh, steps, since.reused, strict=True)
    ]
    if all(forced):
        branch.since = Accumulated.nothing(len(steps), since.total.device, since.total.dtype)
        return [False] * len(steps)
    change, product = _change(method, branch, indicator, steps, count, total)
    if any(forced):  # NaN is not below any threshold
        change = change.masked_fill(torch.tensor(forced, device=change.device), math.nan)
    reuse, accumulated = accumulate(since.total, change, method.threshold)
    decided: list[bool] = reuse.tolist()
    row = tuple(number + 1 for number in since.reused)
    branch.since = Accumulated(accumulated, product, row).kept(decided)
    return decided


def _change(
    method: FeatureCache,
    branch: BranchMemory,
    indicator: Tensor,
    steps: Sequence[int],
    count: int | None,
    total: Callable[[Tensor], Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Compute what the rule accumulates in this step, (B,), and the product of MagCache's ratios, (B,)."""
    product = branch.since.product
    if method.ratios is not None:
        assert count is not None, "refused by `window`"
        last = count - 1
        ratios = [ratio_at(method.ratios, min(step, last), count) for step in steps]
        return drift(product, torch.tensor(ratios, dtype=product.dtype))
    assert branch.indicator is not None, "kept by rules that compare it"
    if method.rule == "easycache":
        if branch.last is None:
            return torch.full_like(branch.since.total, math.nan), product
        return predicted_change(branch.last.rate, indicator, branch.indicator, branch.last.output), product
    change = relative_change(indicator, branch.indicator, total)
    return change if method.rule == "seacache" else rescale(change, method.coefficients), product
