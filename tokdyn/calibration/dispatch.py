"""Find the calibration of a method, and run it on a model or on each denoiser of a pipeline."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, overload

from torch import nn

from tokdyn.adapters.clock import Level
from tokdyn.calibration.caching import calibrate_cache, together
from tokdyn.calibration.skipping import calibrate_skipping
from tokdyn.errors import InputError
from tokdyn.methods import DepthSkip, FeatureCache, Method
from tokdyn.pipelines import denoisers, is_pipeline
from tokdyn.pipelines.denoisers import naming

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


@overload
def calibrate(
    target: nn.Module,
    calls: Iterable[Mapping[str, Any]],
    method: Calibrated,
    *,
    flops: float | None = None,
    levels: int | Sequence[float] | None = None,
    protected: Sequence[int] | None = None,
    sequential: bool | None = None,
    degree: int | None = None,
    steps: float | None = None,
    level: Level | None = None,
) -> Calibrated: ...


@overload
def calibrate(
    target: Any,
    calls: Mapping[str, Iterable[Mapping[str, Any]]],
    method: Calibrated,
    *,
    flops: float | None = None,
    levels: int | Sequence[float] | None = None,
    protected: Sequence[int] | None = None,
    sequential: bool | None = None,
    degree: int | None = None,
    steps: float | None = None,
    level: Level | None = None,
) -> dict[str, list[Calibrated]]: ...


def calibrate(
    target: Any,
    calls: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]],
    method: Calibrated,
    *,
    flops: float | None = None,
    levels: int | Sequence[float] | None = None,
    protected: Sequence[int] | None = None,
    sequential: bool | None = None,
    degree: int | None = None,
    steps: float | None = None,
    level: Level | None = None,
) -> Calibrated | dict[str, list[Calibrated]]:
    """Set up a method from what a model, or each denoiser of a pipeline, does in recorded calls.

    `DepthSkip` gets a table of the blocks to skip at each noise level: those that change the direction of the image
    tokens least per FLOP, until the share `flops` of the FLOPs of all calls remains. `FeatureCache` gets the polynomial
    that predicts how much the output of the blocks changes from the change of its indicator (arXiv 2411.19108) and,
    with `flops` or `steps`, the threshold. With `rule="magcache"` it gets, in place of the polynomial, the ratios of
    the lengths of the blocks' effect from step to step (arXiv 2506.09045).

    Args:
        target: a model, or a pipeline, each of whose denoisers is calibrated on the calls that it gets. It is not
            wrapped. Models are called again with every call, without gradients, and left as they were.
        calls: from `recording`, or any dictionaries of arguments by name; whole trajectories in order. For a pipeline
            such a list for each denoiser, by the name of its component; those without one are left out.
        method: `DepthSkip()`, `FeatureCache()` or one that `calibrates` knows; its other settings are kept.
        flops: target, as a share of the FLOPs of the calls; a multiply-add is 2 FLOPs.
        levels: DepthSkip: the largest number of noise-level rows in the table (default 10), or the edges between them.
        protected: DepthSkip: blocks that always run; negative numbers count from the end.
        sequential: DepthSkip: choose blocks one by one, and measure the error of the output again after each choice.
            This takes into account that two blocks may replace each other, and takes about (1 - flops) * blocks**2
            times as long as one pass over the calls.
        degree: FeatureCache: degree of the polynomial (default 4).
        steps: FeatureCache: target, as the share of computed steps, instead of `flops`.
        level: the noise level of a call where it is not known, as in `wrap`; give it to `wrap` too.

    Returns:
        A new method, with the fingerprint of the model that it was calibrated on. For a pipeline a list with one for
        each denoiser by name, which `wrap` takes.

    Raises:
        InputError: the target is out of reach, the method has no such option, or the calls do not fit.
        UnsupportedModelError: no adapter knows the model.
    """
    options: dict[str, Any] = {"flops": flops, "levels": levels, "protected": protected, "sequential": sequential}
    options |= {"degree": degree, "steps": steps, "level": level}
    calibrator = _calibrator(type(method), options)
    if not is_pipeline(target):
        if isinstance(calls, Mapping):
            raise InputError(f"calls by name are for pipelines; give a list of those of this {type(target).__name__}.")
        return calibrator(target, calls, method).method  # type: ignore[no-any-return]
    found: dict[str, Any] = {}
    for name, (model, own) in _called(target, calls).items():
        if not own:
            raise InputError(
                f"{name} of this {type(target).__name__} got no calls; record more steps, or leave it out of the calls "
                "to calibrate the others."
            )
        with naming(name):
            found[name] = calibrator(model, own, method)
    return {name: [each.method] for name, each in together(found).items()}


def _calibrator(kind: type[Method], options: Mapping[str, Any]) -> Calibrator:
    """Return the function that calibrates a kind of method, with its options; those that are None are not given."""
    calibrator = next((_CALIBRATORS[base] for base in kind.__mro__ if base in _CALIBRATORS), None)
    if calibrator is None:
        known = " or ".join(f"{each.__name__}()" for each in _CALIBRATORS)
        raise InputError(f"{kind.__name__} cannot be calibrated; calibrate {known}.")
    given = {name: value for name, value in options.items() if value is not None}
    takes = {name: each for name, each in inspect.signature(calibrator).parameters.items() if name in options}
    for name in given:
        if name not in takes:
            raise InputError(f"{name} has no effect on {kind.__name__}; leave it out.")
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in given:
            raise InputError(f"{kind.__name__} needs a target to be calibrated; set {name}, such as flops=0.7.")
    return partial(calibrator, **given)


def _called(pipe: Any, calls: Any) -> dict[str, tuple[nn.Module, list[Mapping[str, Any]]]]:
    """Return the denoisers of a pipeline that calls are given for, with these calls, by name."""
    models = denoisers(pipe)
    if not isinstance(calls, Mapping) or not calls or not set(calls) <= set(models):
        raise InputError(
            f"the calls of this {type(pipe).__name__} are a list for each of its denoisers, by name "
            f"({', '.join(models)}); record them with tokdyn.recording(pipe)."
        )
    return {name: (models[name], list(own)) for name, own in calls.items()}
