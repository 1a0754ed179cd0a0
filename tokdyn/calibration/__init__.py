"""Calibrating methods on recorded calls of a model: what DepthSkip skips, when FeatureCache reuses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from tokdyn.calibration.caching import CacheCalibration, calibrate_cache
from tokdyn.calibration.recording import Call, recording
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
    """Set up a method by what a model does in recorded calls.

    `DepthSkip` gets the table of blocks that are skipped at each noise level: those that turn the image tokens least
    per FLOP, for a share `flops` of the FLOPs of all calls together. `FeatureCache` gets the polynomial that predicts
    from the change of its indicator how much the output of the blocks changes (arXiv 2411.19108), and with `flops` or
    `steps` the threshold too.

    Args:
        model: not wrapped. It is called again with every call, without gradients, and is left as it was.
        calls: from `recording`, or any dictionaries of arguments by name; whole trajectories, in order.
        method: `DepthSkip()` or `FeatureCache()`; its other settings are kept.
        flops: share of the FLOPs of the calls to come down to.
        levels: DepthSkip: how many rows of noise levels the table has at most, 10 by default, or edges between them.
        protected: DepthSkip: blocks that always run; negative numbers count from the end.
        sequential: DepthSkip: choose one block after the other by the error of the output, measured anew with all that
            is skipped so far. This sees that two blocks may stand in for each other, and takes about
            (1 - flops) * blocks^2 times as long as one pass over the calls.
        degree: FeatureCache: of the polynomial, 4 by default.
        steps: FeatureCache: share of the steps whose blocks may run, instead of `flops`.

    Returns:
        A new method, with a fingerprint of what it was calibrated on.

    Raises:
        InputError: a target out of reach, an option that the method does not have, calls that do not fit.
        UnsupportedModelError: no adapter knows the model.
    """
    skipping = {"levels": levels, "protected": protected, "sequential": sequential}
    caching = {"degree": degree, "steps": steps}
    mine, others = (skipping, caching) if isinstance(method, DepthSkip) else (caching, skipping)
    if not isinstance(method, DepthSkip | FeatureCache):
        raise InputError(f"{type(method).__name__} has nothing to calibrate; calibrate DepthSkip() or FeatureCache().")
    foreign = [name for name, value in others.items() if value is not None]
    if foreign:
        raise InputError(f"{foreign[0]} has no meaning for {type(method).__name__}; leave it out.")
    given: dict[str, Any] = {name: value for name, value in mine.items() if value is not None}
    made: Any
    if isinstance(method, FeatureCache):
        made = calibrate_cache(model, calls, method, flops=flops, **given).method
    elif flops is None:
        raise InputError("DepthSkip is calibrated for a share of the FLOPs; say which, as in flops=0.7.")
    else:
        made = calibrate_skipping(model, calls, method, flops, **given).method
    return made  # type: ignore[no-any-return]
