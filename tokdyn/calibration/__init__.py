"""Calibrate methods on recorded calls of a model: which blocks DepthSkip skips, and when FeatureCache reuses them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from tokdyn.calibration.caching import CacheCalibration, calibrate_cache
from tokdyn.calibration.skipping import SkipCalibration, calibrate_skipping
from tokdyn.errors import InputError
from tokdyn.methods import DepthSkip, FeatureCache, Method
from tokdyn.recorder import Call, recording

__all__ = [
    "CacheCalibration",
    "Call",
    "SkipCalibration",
    "calibrate",
    "calibrate_cache",
    "calibrate_skipping",
    "calibrates",
    "recording",
]

Calibrated = TypeVar("Calibrated", bound=Method)
Calibrator = Callable[..., Any]
"""Takes a model, its calls, a method and some of the options of `calibrate`; what it returns has a `method`."""
_CALIBRATORS: dict[type[Method], Calibrator] = {DepthSkip: calibrate_skipping, FeatureCache: calibrate_cache}


def calibrates(method: type[Method]) -> Callable[[Calibrator], Calibrator]:
    """Register the function that `calibrate` calls for a method, and for classes derived from it."""

    def register(calibrator: Calibrator) -> Calibrator:
        _CALIBRATORS[method] = calibrator
        return calibrator

    return register


def calibrate(
    model: nn.Module,
    calls: Iterable[Mapping[str, Any]],
    method: Calibrated,
    *,
    flops: float | None = None,
    levels: int | Sequence[float] | None = None,
    protected: Sequence[int] | None = None,
    sequential: bool | None = None,
    degree: int | None = None,
    steps: float | None = None,
) -> Calibrated:
    """Set up a method from what a model does in recorded calls.

    `DepthSkip` gets a table of the blocks to skip at each noise level: those that change the direction of the image
    tokens least per FLOP, until the share `flops` of the FLOPs of all calls remains. `FeatureCache` gets the polynomial
    that predicts how much the output of the blocks changes from the change of its indicator (arXiv 2411.19108) and,
    with `flops` or `steps`, the threshold.

    Args:
        model: not wrapped. It is called again with every call, without gradients, and left as it was.
        calls: from `recording`, or any dictionaries of arguments by name; whole trajectories in order.
        method: `DepthSkip()`, `FeatureCache()` or one that `calibrates` knows; its other settings are kept.
        flops: target, as a share of the FLOPs of the calls; a multiply-add is 2 FLOPs.
        levels: DepthSkip: the largest number of noise-level rows in the table (default 10), or the edges between them.
        protected: DepthSkip: blocks that always run; negative numbers count from the end.
        sequential: DepthSkip: choose blocks one by one, and measure the error of the output again after each choice.
            This takes into account that two blocks may replace each other, and takes about (1 - flops) * blocks**2
            times as long as one pass over the calls.
        degree: FeatureCache: degree of the polynomial (default 4).
        steps: FeatureCache: target, as the share of computed steps, instead of `flops`.

    Returns:
        A new method, with the fingerprint of the model that it was calibrated on.

    Raises:
        InputError: the target is out of reach, the method has no such option, or the calls do not fit.
        UnsupportedModelError: no adapter knows the model.
    """
    kind = type(method)
    calibrator = next((_CALIBRATORS[base] for base in kind.__mro__ if base in _CALIBRATORS), None)
    if calibrator is None:
        known = " or ".join(f"{each.__name__}()" for each in _CALIBRATORS)
        raise InputError(f"{kind.__name__} cannot be calibrated; calibrate {known}.")
    options = {"flops": flops, "levels": levels, "protected": protected, "sequential": sequential}
    options |= {"degree": degree, "steps": steps}
    given = {name: value for name, value in options.items() if value is not None}
    takes = {name: each for name, each in inspect.signature(calibrator).parameters.items() if name in options}
    for name in given:
        if name not in takes:
            raise InputError(f"{name} has no effect on {kind.__name__}; leave it out.")
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in given:
            raise InputError(f"{kind.__name__} needs a target to be calibrated; set {name}, such as flops=0.7.")
    return calibrator(model, calls, method, **given).method  # type: ignore[no-any-return]
