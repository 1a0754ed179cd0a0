"""Calibrate FeatureCache: how much the output of the blocks changes with their input (arXiv 2411.19108)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.clock import Level
from tokdyn.attach import fingerprint
from tokdyn.calibration.magnitudes import Ratios, in_whole_run, magnitude_ratio, ratios_of
from tokdyn.calibration.observer import Observer, observing
from tokdyn.calibration.replay import Replay, Spent
from tokdyn.calibration.threshold import Step, choose_threshold, share_of
from tokdyn.errors import InputError
from tokdyn.methods import FeatureCache
from tokdyn.ops.caching import fit_rescaling, relative_change, rescale
from tokdyn.progress import progress
from tokdyn.recorder import Call, evaluating, listed


@dataclass(frozen=True)
class CacheCalibration:
    """The result of `calibrate_cache`.

    Attributes:
        method: the cache with the polynomial, and with the threshold if a target was given.
        steps: measurements, one per recorded call.
        fit: share of the variance of the effects that the polynomial explains (R**2); None if none is fitted.
        flops: share of the FLOPs of the recorded calls that remains with the threshold.
        computed: share of computed steps with the threshold.
        ratios: MagCache's ratios with their spread; None for other rules.
        alone: the cache on the calls of this denoiser alone, if several share a run and `method` has a ratio for each
            of its steps; None otherwise.
    """

    method: FeatureCache
    steps: tuple[Step, ...]
    fit: float | None
    flops: float
    computed: float
    ratios: Ratios | None = None
    alone: FeatureCache | None = None

    @property
    def local(self) -> FeatureCache:
        """The cache that decides about the recorded calls."""
        return self.alone or self.method


def calibrate_cache(
    model: nn.Module,
    calls: Iterable[Mapping[str, Any]],
    method: FeatureCache,
    degree: int = 4,
    flops: float | None = None,
    steps: float | None = None,
    level: Level | None = None,
) -> CacheCalibration:
    """Fit the polynomial, or measure MagCache's ratios, and choose the threshold; see `tokdyn.calibrate`.

    Raises:
        InputError: the settings contradict each other or do not fit the calls.
        UnsupportedModelError: no adapter knows the model.
    """
    if method.steps is not None:
        raise InputError(
            f"FeatureCache(steps={method.steps}) already fixes the computed steps; calibrate FeatureCache() with "
            "steps=0.5, for example, to compute half of them."
        )
    if method.rule not in ("teacache", "magcache"):
        raise InputError(
            f"FeatureCache(rule={method.rule!r}) needs no calibration: its rule has no numbers of a model; choose a "
            "threshold, or calibrate FeatureCache()."
        )
    if degree < 1:
        raise InputError(f"degree={degree} is no degree of a polynomial; give 1 or more.")
    if flops is not None and steps is not None:
        raise InputError("flops and steps are both targets for the threshold; give one of them.")
    replay, recorded = Replay(model, level), listed(calls)
    with evaluating(model):
        measured = measure(replay, recorded, method)
    if method.rule == "magcache":
        fit, ratios = None, ratios_of([(step.position, step.magnitude) for step in measured])
        settings = method.model_dump() | {"ratios": ratios.mean}
    else:
        pairs = [(step.change, step.effect) for step in measured if step.change is not None and step.effect is not None]
        changes, effects = (torch.cat(column) for column in zip(*pairs, strict=True))
        coefficients = fit_rescaling(changes, effects, degree)
        fit, ratios = _explained_variance(changes, effects, coefficients), None
        settings = method.model_dump() | {"coefficients": coefficients}
    if flops is not None or steps is not None:
        settings["threshold"] = choose_threshold(measured, FeatureCache(**settings), flops=flops, computed=steps)
    calibrated = FeatureCache(**{**settings, "fingerprint": fingerprint(model, _grid(measured))})
    share = share_of(measured, calibrated)
    return CacheCalibration(calibrated, measured, fit, share.flops, share.computed, ratios)


def together(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of all denoisers of a pipeline, with ratios for every step of the run that they share.

    Args:
        found: the result of each denoiser, by name; only MagCache's ratios are changed.
    """
    own = {
        name: (each.method, max(each.steps[0].levels))
        for name, each in found.items()
        if isinstance(each, CacheCalibration) and each.ratios is not None
    }
    if len(own) < 2:
        return dict(found)
    placed = in_whole_run(own).items()
    return {**found, **{name: replace(found[name], method=cache, alone=own[name][0]) for name, cache in placed}}


def measure(replay: Replay, calls: Sequence[Call], method: FeatureCache) -> tuple[Step, ...]:
    """Replay all calls and compare the indicator and output of the blocks with those of the step before."""
    last: dict[Any, tuple[int, Tensor, Tensor, Tensor]] = {}
    steps = []
    with observing(replay.model, method, replay.level) as observer, progress("measuring", len(calls)) as advance:
        for call in calls:
            costs = replay.counted(call, partial(_costs, replay, call, observer))
            position, levels, indicator, start, output = observer.take()
            change, effect, magnitude = None, None, None
            known = last.get(position.branch, (-1, indicator, start, output))
            trajectory, last_indicator, last_start, last_output = known
            if trajectory == position.trajectory and last_indicator.shape == indicator.shape:
                change = relative_change(indicator, last_indicator).cpu()
                effect = relative_change(output, last_output).cpu()
                if method.rule == "magcache":
                    magnitude = magnitude_ratio(output - start, last_output - last_start).cpu()
            last[position.branch] = (position.trajectory, indicator, start, output)
            steps.append(Step(position, levels, change, effect, *costs, magnitude))
            advance(1)
    if all(step.change is None for step in steps):
        raise InputError(
            "no two recorded calls belong to one trajectory; record whole trajectories, with their calls in order."
        )
    return tuple(steps)


def _costs(replay: Replay, call: Call, observer: Observer, spent: Spent) -> tuple[int, int, int]:
    """Count the FLOPs that a cache can skip, those of everything else, and those of the model without a cache."""
    observer.spent = spent
    replay(call)
    return observer.inside, spent() - observer.inside, spent() - observer.indicator_flops


def _grid(steps: Sequence[Step]) -> tuple[float, ...]:
    """Return the noise levels of a trajectory, or none if trajectories differ in their number of steps."""
    levels: dict[int, list[float]] = {}
    branch = steps[0].position.label
    for step in steps:
        if step.position.label == branch:
            levels.setdefault(step.position.trajectory, []).append(step.levels[0])
    one, *others = levels.values()
    return tuple(one) if all(len(other) == len(one) for other in others) else ()


def _explained_variance(changes: Tensor, effects: Tensor, coefficients: Sequence[float]) -> float:
    """Compute which share of the variance of the finite effects the polynomial explains."""
    finite = changes.isfinite() & effects.isfinite()
    x, y = changes[finite].double(), effects[finite].double()
    residual = (rescale(x, coefficients) - y).square().sum()
    variance = (y - y.mean()).square().sum()
    return 1.0 if variance == 0 else float(1 - residual / variance)
