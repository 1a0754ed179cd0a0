"""Simulate a cache with a given threshold on recorded steps, and choose the threshold that meets a target."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokdyn.calibration.magnitudes import decisions, thresholds
from tokdyn.errors import InputError
from tokdyn.methods import FeatureCache
from tokdyn.ops.caching import accumulate, rescale
from tokdyn.trace.trajectory import Position

_CANDIDATES = 4096  # largest number of thresholds to choose from


@dataclass(frozen=True)
class Step:
    """A recorded call as a cache sees it.

    Attributes:
        position: the trajectory, step and guidance branch of the call.
        levels: noise level of every sample.
        change: (B,) relative change of the indicator since the step before; None in a first step.
        effect: (B,) relative change of the image tokens after the last block; None in a first step.
        stack: FLOPs of the blocks that a cache can skip; a multiply-add is 2 FLOPs.
        other: FLOPs of everything else, including the indicator.
        plain: FLOPs of the model without a cache.
        magnitude: (B,) ratio of the lengths of the blocks' effect and of that in the step before; None in a first step,
            or if the rule does not need it.
    """

    position: Position
    levels: tuple[float, ...]
    change: Tensor | None
    effect: Tensor | None
    stack: int
    other: int
    plain: int
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Share:
    """What a cache leaves of recorded calls.

    Attributes:
        flops: share of the FLOPs that remains.
        computed: share of computed steps over all samples.
    """

    flops: float
    computed: float


def simulate(steps: Sequence[Step], method: FeatureCache) -> Iterator[Tensor]:
    """Yield (B,) bool for every step: the samples that would reuse the last output, decided like in the cache."""
    if method.rule == "magcache":
        yield from decisions([step.position for step in steps], method)
        return
    totals: dict[Any, Tensor] = {}
    rows: dict[Any, Tensor] = {}  # cached steps in a row
    for step in steps:
        branch = step.position.branch
        if step.change is None:
            totals[branch] = rows[branch] = torch.zeros(len(step.levels))
            yield torch.zeros(len(step.levels), dtype=torch.bool)
            continue
        open_now = step.position.steps[0] in method.window(step.position.num_steps or method.num_steps)
        change = rescale(step.change, method.coefficients)
        if method.max_reused is not None:
            change = change.masked_fill(rows[branch] >= method.max_reused, math.nan)
        threshold = method.threshold if open_now else math.nan
        reuse, totals[branch] = accumulate(totals[branch], change, threshold)
        rows[branch] = torch.where(reuse, rows[branch] + 1, 0.0)
        yield reuse


def share_of(steps: Sequence[Step], method: FeatureCache) -> Share:
    """Compute which share of the FLOPs and steps a cache leaves of recorded steps."""
    spent, plain, computed, samples = 0.0, 0, 0, 0
    for step, reuse in zip(steps, simulate(steps, method), strict=True):
        ran = len(reuse) - int(reuse.sum())
        spent += step.other + step.stack * ran / len(reuse)
        plain += step.plain
        computed += ran
        samples += len(reuse)
    return Share(spent / plain, computed / samples)


def choose_threshold(
    steps: Sequence[Step], method: FeatureCache, flops: float | None = None, computed: float | None = None
) -> float:
    """Return the lowest threshold with which a cache computes at most a share of recorded steps or FLOPs.

    Args:
        steps: recorded steps.
        method: the cache; its threshold does not matter.
        flops: target, as the share of the FLOPs.
        computed: target, as the share of computed steps.

    Raises:
        InputError: the target is not a share, or is out of reach.
    """
    name, target = ("steps", computed) if flops is None else ("flops", flops)
    assert target is not None
    if not 0.0 < target < 1.0:
        raise InputError(f"{name}={target:g} is not a share of the whole; give a number between 0 and 1.")

    def share(threshold: float) -> float:
        found = share_of(steps, method.model_copy(update={"threshold": threshold}))
        return found.computed if flops is None else found.flops

    if method.rule == "magcache":
        candidates = thresholds(method, len(method.ratios or ()))
    else:
        candidates = _candidates(steps, method.coefficients)
    least = share(candidates[-1])
    if least > target:
        raise InputError(
            f"{name}={target:g} is out of reach: reusing every step that can be reused leaves {least:.3g}; raise it."
        )
    low, high = -1, len(candidates) - 1  # above the target at low, at most the target at high
    while high - low > 1:
        middle = (low + high) // 2
        if share(candidates[middle]) <= target:
            high = middle
        else:
            low = middle
    rounded = float(f"{candidates[high]:.4g}")
    return rounded if share(rounded) == share(candidates[high]) else candidates[high]


def _candidates(steps: Sequence[Step], coefficients: Sequence[float]) -> list[float]:
    """Return rising thresholds between all sums of changes that a cache can accumulate."""
    trajectories: dict[Any, list[list[Tensor]]] = {}
    for step in steps:
        if step.change is None:
            trajectories.setdefault(step.position.branch, []).append([])
        else:
            trajectories[step.position.branch][-1].append(rescale(step.change, coefficients))
    sums = [torch.zeros(1)]
    for trajectory in (each for branch in trajectories.values() for each in branch if each):
        changes = torch.stack(trajectory)  # (steps, B)
        sums += [changes[start:].cumsum(0).flatten() for start in range(len(changes))]
    values = torch.cat(sums).double()
    values = torch.unique(values[values.isfinite()])  # rising
    if len(values) > _CANDIDATES:
        values = values[torch.linspace(0, len(values) - 1, _CANDIDATES).round().long()]
    between = (values[1:] + values[:-1]) / 2
    return [*between.tolist(), float(values[-1]) * 1.001 + 1e-6]
