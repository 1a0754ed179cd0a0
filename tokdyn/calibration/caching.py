"""Calibrating FeatureCache: how much the output of the blocks changes when their input does (arXiv 2411.19108)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.attach import fingerprint
from tokdyn.calibration.observer import Observer, observing
from tokdyn.calibration.recording import Call, listed
from tokdyn.calibration.replay import Replay, Spent, evaluating
from tokdyn.calibration.threshold import Step, choose_threshold, share_of
from tokdyn.errors import InputError
from tokdyn.methods import FeatureCache
from tokdyn.ops.caching import fit_rescaling, relative_change, rescale
from tokdyn.progress import progress


@dataclass(frozen=True)
class CacheCalibration:
    """The result of `calibrate_cache`.

    Attributes:
        method: with the polynomial, and the threshold if a target was given.
        steps: what was measured, one for each recorded call.
        fit: share of the variance of the effects that the polynomial explains (R^2).
        flops: share of the FLOPs of the recorded calls that is left with the threshold.
        computed: share of the steps whose blocks run with it.
    """

    method: FeatureCache
    steps: tuple[Step, ...]
    fit: float
    flops: float
    computed: float


def calibrate_cache(
    model: nn.Module,
    calls: Iterable[Mapping[str, Any]],
    method: FeatureCache,
    degree: int = 4,
    flops: float | None = None,
    steps: float | None = None,
) -> CacheCalibration:
    """Fit the polynomial and choose the threshold; see `tokdyn.calibrate` for the arguments.

    Raises:
        InputError: settings that do not fit each other or the calls.
        UnsupportedModelError: no adapter knows the model.
    """
    if method.steps is not None:
        raise InputError(
            f"FeatureCache(steps={method.steps}) says already which steps are computed; calibrate FeatureCache() with "
            "steps=0.5, say, for half of them."
        )
    if degree < 1:
        raise InputError(f"degree is {degree}; a polynomial of degree 1 or more is needed.")
    if flops is not None and steps is not None:
        raise InputError("give flops or steps as the target for the threshold, not both.")
    replay, found = Replay(model), listed(calls)
    with evaluating(model):
        measured = measure(replay, found, method)
    pairs = [(step.change, step.effect) for step in measured if step.change is not None and step.effect is not None]
    changes, effects = (torch.cat(column) for column in zip(*pairs, strict=True))
    coefficients = fit_rescaling(changes, effects, degree)
    settings = method.model_dump() | {"coefficients": coefficients}
    if flops is not None or steps is not None:
        settings["threshold"] = choose_threshold(measured, FeatureCache(**settings), flops=flops, computed=steps)
    made = FeatureCache(**{**settings, "fingerprint": fingerprint(model, _grid(measured))})
    share = share_of(measured, made)
    return CacheCalibration(made, measured, _explained(changes, effects, coefficients), share.flops, share.computed)


def measure(replay: Replay, calls: Sequence[Call], method: FeatureCache) -> tuple[Step, ...]:
    """Call the model with all calls, and compare indicator and output of the blocks with those of the step before."""
    last: dict[Any, tuple[int, Tensor, Tensor]] = {}
    steps = []
    with observing(replay.model, method) as observer, progress("measuring", len(calls)) as advance:
        for call in calls:
            costs = replay.counted(call, partial(_costs, replay, call, observer))
            position, levels, told, output = observer.seen()
            change, effect = None, None
            number, told_before, output_before = last.get(position.branch, (-1, told, output))
            if number == position.run and told_before.shape == told.shape:
                change = relative_change(told, told_before).cpu()
                effect = relative_change(output, output_before).cpu()
            last[position.branch] = (position.run, told, output)
            steps.append(Step(position, levels, change, effect, *costs))
            advance(1)
    if all(step.change is None for step in steps):
        raise InputError(
            "the recorded calls hold no two steps of one trajectory; record whole trajectories, the calls in order."
        )
    return tuple(steps)


def _costs(replay: Replay, call: Call, observer: Observer, spent: Spent) -> tuple[int, int, int]:
    """FLOPs of what a cache can pass by, of everything else, and of the model without a cache."""
    observer.spent = spent
    replay(call)
    return observer.inside, spent() - observer.inside, spent() - observer.looking


def _grid(steps: Sequence[Step]) -> tuple[float, ...]:
    """Noise levels of the steps of a trajectory, if all trajectories have the same number of them."""
    found: dict[int, list[float]] = {}
    branch = steps[0].position.label
    for step in steps:
        if step.position.label == branch:
            found.setdefault(step.position.run, []).append(step.levels[0])
    one, *others = found.values()
    return tuple(one) if all(len(other) == len(one) for other in others) else ()


def _explained(changes: Tensor, effects: Tensor, coefficients: Sequence[float]) -> float:
    good = changes.isfinite() & effects.isfinite()
    x, y = changes[good].double(), effects[good].double()
    left = (rescale(x, coefficients) - y).square().sum()
    spread = (y - y.mean()).square().sum()
    return 1.0 if spread == 0 else float(1 - left / spread)
