"""Calibrating FeatureCache: how much the output of the blocks changes when their input does (arXiv 2411.19108)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.attach.fingerprint import fingerprint
from tokdyn.attach.trajectory import Trajectory, Turn
from tokdyn.calibration.recording import Call, listed
from tokdyn.calibration.replay import Costs, Look, Replay, evaluating
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
        measured = measure(replay, found, method.indicator)
    changes, effects = (
        torch.cat([getattr(s, name) for s in measured if s.change is not None] or [torch.zeros(0)])
        for name in ("change", "effect")
    )
    coefficients = fit_rescaling(changes, effects, degree)
    settings = method.model_dump() | {"coefficients": coefficients}
    if flops is not None or steps is not None:
        settings["threshold"] = choose_threshold(measured, FeatureCache(**settings), flops=flops, computed=steps)
    made = FeatureCache(**{**settings, "fingerprint": fingerprint(model, _grid(measured))})
    share = share_of(measured, made)
    return CacheCalibration(made, measured, _explained(changes, effects, coefficients), share.flops, share.computed)


def measure(replay: Replay, calls: Sequence[Call], indicator: str) -> tuple[Step, ...]:
    """Call the model with all calls, and compare indicator and output of the blocks with those of the step before."""
    trajectory = Trajectory()
    last: dict[Any, tuple[int, Tensor, Tensor]] = {}
    steps = []
    with progress("measuring", len(calls)) as advance:
        for call in calls:
            told, output, costs = _look(replay, call, indicator)
            levels = replay.levels(call, len(output))
            turn = trajectory.turn(levels, None)
            change, effect = None, None
            number, told_before, output_before = last.get(turn.branch, (-1, told, output))
            if number == turn.trajectory and told_before.shape == told.shape:
                change = relative_change(told, told_before).cpu()
                effect = relative_change(output, output_before).cpu()
            last[turn.branch] = (turn.trajectory, told, output)
            steps.append(_step(turn, levels, change, effect, costs, first=indicator == "first_block"))
            advance(1)
    if all(step.change is None for step in steps):
        raise InputError(
            "the recorded calls hold no two steps of one trajectory; record whole trajectories, the calls in order."
        )
    return tuple(steps)


def _look(replay: Replay, call: Call, indicator: str) -> tuple[Tensor, Tensor, Costs]:
    """What the cache compares, the image tokens after the last block, and FLOPs of the call."""
    told: list[Tensor] = []
    output: list[Tensor] = []

    def entering(look: Look) -> None:
        if look.block == 0:
            modulated = None if indicator == "first_block" else look.role.stack.modulated
            told.append(look.x if modulated is None else modulated(look.part, look.named))

    def leaving(look: Look) -> None:
        if look.block == 0 and indicator == "first_block":
            told[0] = look.x - told[0]
        if look.block == replay.depth - 1:
            output.append(look.x)

    costs = replay.watched(call, entering, leaving)
    if not told or not output:
        raise InputError(
            f"the first or the last block of {type(replay.model).__name__} did not run in a recorded call; a cache "
            "needs both."
        )
    return told[0], output[0], costs


def _step(
    turn: Turn, levels: tuple[float, ...], change: Tensor | None, effect: Tensor | None, costs: Costs, first: bool
) -> Step:
    always = costs.blocks[0] if first else 0
    stack = sum(costs.blocks) - always
    return Step(turn, levels, change, effect, stack, costs.total - stack + costs.looking, costs.total)


def _grid(steps: Sequence[Step]) -> tuple[float, ...]:
    """Noise levels of the steps of a trajectory, if all trajectories have the same number of them."""
    found: dict[int, list[float]] = {}
    branch = steps[0].turn.branch
    for step in steps:
        if step.turn.branch == branch:
            found.setdefault(step.turn.trajectory, []).append(step.levels[0])
    one, *others = found.values()
    return tuple(one) if all(len(other) == len(one) for other in others) else ()


def _explained(changes: Tensor, effects: Tensor, coefficients: Sequence[float]) -> float:
    good = changes.isfinite() & effects.isfinite()
    x, y = changes[good].double(), effects[good].double()
    left = (rescale(x, coefficients) - y).square().sum()
    spread = (y - y.mean()).square().sum()
    return 1.0 if spread == 0 else float(1 - left / spread)
