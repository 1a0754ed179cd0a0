"""Calibrate methods on recorded calls of a model: which blocks DepthSkip skips, and when FeatureCache reuses them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from tokdyn.calibration.caching import CacheCalibration, calibrate_cache
from tokdyn.calibration.recorder import Call, recording
from tokdyn.calibration.skipping import SkipCalibration, calibrate_skipping
from tokdyn.errors import InputError
from tokdyn.methods import DepthSkip, FeatureCache, Method

__all__ = [
    "CacheCalibration",
    "Call",
    "SkipCalibration",
    "calibrate",
    "calibrate_cache",
    "calibrate_skipping",
    "recording",
]

Calibrated = TypeVar("Calibrated", bound=Method)


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
        method: `DepthSkip()` or `FeatureCache()`; its other settings are kept.
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
    skipping = {"levels": levels, "protected": protected, "sequential": sequential}
    caching = {"degree": degree, "steps": steps}
    mine, others = (skipping, caching) if isinstance(method, DepthSkip) else (caching, skipping)
    if not isinstance(method, DepthSkip | FeatureCache):
        raise InputError(f"{type(method).__name__} cannot be calibrated; calibrate DepthSkip() or FeatureCache().")
    foreign = [name for name, value in others.items() if value is not None]
    if foreign:
        raise InputError(f"{foreign[0]} has no effect on {type(method).__name__}; leave it out.")
    given: dict[str, Any] = {name: value for name, value in mine.items() if value is not None}
    calibrated: Any
    if isinstance(method, FeatureCache):
        calibrated = calibrate_cache(model, calls, method, flops=flops, **given).method
    elif flops is None:
        raise InputError("DepthSkip needs a target; set the share of the FLOPs that remains, such as flops=0.7.")
    else:
        calibrated = calibrate_skipping(model, calls, method, flops, **given).method
    return calibrated  # type: ignore[no-any-return]
