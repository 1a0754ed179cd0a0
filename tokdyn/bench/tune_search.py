"""Search schedules that meet a FLOPs target, ranked by their error on a few images.

A knob is one way to save FLOPs, such as the tail drop or TokenMerge; turning it up saves more. A shape says how far
each knob is turned relative to the others, at each noise level. Multiplying a shape by a strength at which the FLOPs
meet the target gives a schedule. Its error is the distance to the unmodified model's images from the same seeds.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tokdyn.adapters import adapter_for
from tokdyn.attach import accept_methods, attachment_of, unwrap
from tokdyn.bench.stacks import Opened, Stack, attach_stack
from tokdyn.bench.tune_settings import Knob, TuneConfig
from tokdyn.calibration.caching import calibrate_cache
from tokdyn.calibration.replay import Replay
from tokdyn.calibration.skipping import calibrate_skipping
from tokdyn.calibration.threshold import choose_threshold, share_of
from tokdyn.diffusion.guidance import takes_tail_drop
from tokdyn.diffusion.sampling import generate
from tokdyn.errors import InputError, RecipeError, TokdynError
from tokdyn.host import product_type
from tokdyn.methods import DepthSkip, FeatureCache
from tokdyn.methods.registry import to_settings
from tokdyn.pipelines.denoisers import naming
from tokdyn.progress import progress
from tokdyn.recorder import Call, recording
from tokdyn.sample.costs import step_costs

LEVELS = (0.0, 0.5, 1.0)
"""Noise levels at which a knob has a value; between them it is interpolated linearly."""
_LARGEST = {"drop": 0.95, "uncond": 0.95, "merge": 0.7}  # tail drops and merge ratio of fully turned knobs
_SKIP_TARGETS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # shares of the FLOPs that DepthSkip is calibrated for
_FEWEST_COMPUTED = 0.2  # share of computed steps if the knob "cache" is fully turned
_CLOSE = 0.003  # a schedule is close enough if its share of the FLOPs is so little below the target
_FAR = 0.05  # knobs that move in jumps may stay below the target by so much
_ATTEMPTS = 9
_MUTATION_SPREADS = (0.08, 0.3)  # standard deviations of small and large mutations
SHOWN = 4
"""Images of each trial that are kept for the page."""


Shape = dict[Knob, tuple[float, ...]]
"""How far each knob is turned, in [0, 1]: a value for each of `LEVELS`, or for calibrated methods one per denoiser."""


@dataclass(frozen=True)
class Trial:
    """A schedule that was tried.

    Attributes:
        shape: the shape of the schedule.
        strength: the factor that the shape is multiplied by.
        stack: the resulting schedule.
        flops: FLOPs of the schedule, as a share of those of the unmodified model.
        error: mean squared distance to the images of the unmodified model, divided by their variance.
        shown: its first images, as in `Drawn`.
    """

    shape: Shape
    strength: float
    stack: Stack
    flops: float
    error: float
    shown: tuple[Tensor, ...] = field(default=(), compare=False, repr=False)

    @property
    def turned(self) -> Shape:
        """The shape multiplied by the strength, at most 1."""
        return {knob: tuple(min(self.strength * value, 1.0) for value in values) for knob, values in self.shape.items()}


@dataclass(frozen=True)
class Drawn:
    """What was drawn with a stack.

    Attributes:
        images: what errors are measured on, on the CPU: (B, C, H, W), or all their pixels in a row.
        gflops: 1e9 FLOPs of one image, a multiply-add being 2; of a pipeline, the share of those without methods.
        shown: the first images, for the page: (C, H, W) as the model draws them, or (H, W, 3) bytes of a pipeline, made
            smaller.
    """

    images: Tensor
    gflops: float
    shown: tuple[Tensor, ...]


def _steps_of(model: nn.Module, calls: Sequence[Call]) -> int:
    """Count the sampling steps that calls belong to, by their noise levels."""
    replay = Replay(model)
    return len({replay.levels(call, 1)[0] for call in calls})


@dataclass
class Tuner(ABC):
    """One or several denoisers with their knobs, which are turned until a FLOPs target is met. Call `prepare` first.

    Attributes:
        config: the settings, of which `flops`, `model`, `trials` and `seed` are read here.
        knobs: the knobs to turn.
        reference: what the unmodified model draws.
        denoisers: names of the denoisers of a pipeline; a model is the only one, "".
        caches: for each denoiser the calibrated FeatureCache with the largest threshold, if the knob "cache" is used.
        skips: for each denoiser DepthSkip calibrated for several shares of the FLOPs, the one that skips least first.
    """

    config: Any
    knobs: tuple[Knob, ...]
    reference: Drawn = field(init=False)
    denoisers: tuple[str, ...] = ("",)
    caches: dict[str, FeatureCache] = field(default_factory=dict)
    skips: dict[str, tuple[DepthSkip, ...]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Draw the images of the unmodified model, and calibrate FeatureCache and DepthSkip on its calls."""
        for name, (model, calls) in self.record().items():
            if calls:  # a denoiser may be left no step
                with naming(name):
                    self._calibrate(name, model, calls)

    def _calibrate(self, name: str, model: nn.Module, calls: list[Call]) -> None:
        """Calibrate the methods of a denoiser on the calls that it got."""
        if "cache" in self.knobs and _steps_of(model, calls) > 1:
            found = calibrate_cache(model, calls, FeatureCache())
            fewest = share_of(found.steps, found.method.model_copy(update={"threshold": math.inf})).computed
            if fewest < 1.0:
                threshold = choose_threshold(found.steps, found.method, computed=max(_FEWEST_COMPUTED, fewest))
                self.caches[name] = found.method.model_copy(update={"threshold": threshold})
        if "skip" in self.knobs:
            tables = []
            for share in _SKIP_TARGETS:
                try:
                    tables.append(calibrate_skipping(model, calls, DepthSkip(), share).method)
                except InputError:  # the parts that always run cost more than this
                    break
            self.skips[name] = tuple(tables)

    @abstractmethod
    def record(self) -> dict[str, tuple[nn.Module, list[Call]]]:
        """Draw the reference, and set `reference` and `denoisers`.

        Returns:
            Each denoiser without methods, and its calls, by name.
        """

    @abstractmethod
    def draw(self, stack: Stack) -> Drawn | None:
        """Draw with a stack; return None if its methods cannot be combined on this model."""

    def stack(self, shape: Shape, strength: float, name: str = "tuned") -> Stack:
        """Return the schedule of a shape multiplied by a strength."""
        turned = {knob: [strength * value for value in values] for knob, values in shape.items()}
        methods = {name: self._methods(place, turned) for place, name in enumerate(self.denoisers)}
        drops: dict[str, Any] = {}
        if "drop" in turned:
            drops["tail_drop"] = _curve(turned["drop"], _LARGEST["drop"])
        if "uncond" in turned:
            drops["uncond_tail_drop"] = _curve(turned["uncond"], _LARGEST["uncond"])
        given = methods if len(methods) > 1 else methods[self.denoisers[0]]
        return Stack(name=name, model=self.config.model, methods=given, **drops)

    def _methods(self, place: int, turned: Mapping[Knob, Sequence[float]]) -> tuple[dict[str, Any], ...]:
        """Return the methods of the denoiser at this place, with its knobs turned so far."""
        name = self.denoisers[place]
        methods: list[dict[str, Any]] = []
        if name in self.caches and "cache" in turned and turned["cache"][place] > 0:
            cache, share = self.caches[name], min(turned["cache"][place], 1.0)
            methods.append(to_settings(cache.model_copy(update={"threshold": share * cache.threshold})))
        if "merge" in turned and max(turned["merge"]) > 0:
            methods.append({"method": "TokenMerge", "ratio": _curve(turned["merge"], _LARGEST["merge"])})
        if self.skips.get(name) and "skip" in turned:
            tables = self.skips[name]
            chosen = round(min(turned["skip"][place], 1.0) * len(tables))
            methods += [to_settings(tables[chosen - 1])] if chosen else []
        return tuple(methods)

    def meet_target(self, shape: Shape, guess: float | None = None) -> Trial | None:
        """Search the strength at which the FLOPs are at the target, or at most 0.3% of all FLOPs below it.

        In each attempt, the FLOPs are assumed to be linear in the strength between the closest attempts above and below
        the target.

        Args:
            shape: the shape of the schedule.
            guess: the strength to try first; None takes the largest.

        Returns:
            The attempt closest below the target. None if the target cannot be met, or if knobs that move in jumps stay
            below it by more than 5% of all FLOPs.
        """
        target, most, best = self.config.flops, 1.0 / max(max(values) for values in shape.values()), None
        low, above, high, below = 0.0, 1.0, most, 0.0  # strengths on either side of the target, and their FLOPs
        strength, sides = most if guess is None else min(guess, most), list[bool]()
        for _ in range(_ATTEMPTS):
            trial = self.try_strength(shape, strength)
            if trial is None or (strength == most and trial.flops > target):
                return None
            sides.append(trial.flops <= target)
            if trial.flops > target:
                low, above = strength, trial.flops
            else:
                high, below = strength, trial.flops
                best = trial if best is None or trial.flops > best.flops else best
                if trial.flops >= target - _CLOSE:
                    break
            if best is None:  # extrapolate from nothing through this attempt, and go a little further
                strength = min(most, 1.05 * strength * (1.0 - target) / max(1.0 - trial.flops, 1e-6))
                continue
            part = (above - target + _CLOSE / 2) / max(above - below, 1e-6)
            if len(sides) > 2 and len(set(sides[-3:])) == 1:  # far from linear here, so bisect
                part = 0.5
            strength = low + (high - low) * min(max(part, 0.05), 0.95)
        return best if best is not None and best.flops >= target - _FAR else None

    def try_strength(self, shape: Shape, strength: float) -> Trial | None:
        """Draw images with a schedule and measure them; None if its methods cannot be combined on this model."""
        stack = self.stack(shape, strength)
        drawn = self.draw(stack)
        if drawn is None:
            return None
        bare = self.reference
        error = (drawn.images - bare.images).square().mean() / bare.images.var().clamp(min=1e-12)
        return Trial(shape, strength, stack, drawn.gflops / bare.gflops, float(error), drawn.shown)


@dataclass
class ModelTuner(Tuner):
    """A model that tokdyn samples itself, with its knobs.

    Attributes:
        opened: the unmodified model, on its device.
    """

    config: TuneConfig
    opened: Opened = field(kw_only=True)

    def record(self) -> dict[str, tuple[nn.Module, list[Call]]]:
        """See `Tuner.record`."""
        bare = replace(self.opened, model=copy.deepcopy(self.opened.model))
        with recording(bare.model, host=True) as calls:
            self.reference = self._draw(bare)
        if attachment_of(bare.model) is not None:  # methods are calibrated on the model without others
            unwrap(bare.model)
        return {"": (bare.model, calls)}

    def draw(self, stack: Stack) -> Drawn | None:
        """See `Tuner.draw`."""
        try:
            other = replace(self.opened, stack=stack, model=attach_stack(copy.deepcopy(self.opened.model), stack))
        except TokdynError:
            return None
        if attachment_of(other.model) is not None:  # what a trial falls short of, its FLOPs show
            accept_methods(other.model)
        return self._draw(other)

    def _draw(self, opened: Opened) -> Drawn:
        """Draw the images (B, C, H, W) that errors are measured on."""
        config, device = self.config, next(opened.model.parameters()).device
        sampler = opened.sampler(config.scheduler, config.steps, config.guidance)
        all_labels = opened.labels(config.images)
        images, spent = [], 0.0
        for start in range(0, config.images, config.batch_size):
            seeds = list(range(start, min(start + config.batch_size, config.images)))
            labels = [all_labels[seed] for seed in seeds]
            generation = generate(
                opened.model, sampler, opened.objective, labels, [config.seed + seed for seed in seeds],
                dtype=product_type(config.precision, device),
            )  # fmt: skip
            costs = [cost.gflops for cost in step_costs(opened.model, generation.steps, len(seeds))]
            known = [cost for cost in costs if cost is not None]
            if len(known) < len(costs):
                raise RecipeError(f"steps={config.steps} makes more calls than statistics hold: choose fewer steps.")
            spent += sum(known) * len(seeds)
            images.append(generation.images.cpu())
        drawn = torch.cat(images)
        return Drawn(drawn, spent / config.images, drawn[:SHOWN].clone().unbind())


def _curve(values: Sequence[float], largest: float) -> Any:
    """Return a setting as points (noise level, value), values being at most `largest`; a number if all are equal."""
    bounded = [round(min(max(value, 0.0), largest), 4) for value in values]
    return bounded[0] if len(set(bounded)) == 1 else tuple(zip(LEVELS, bounded, strict=True))


def usable_knobs(opened: Opened, guided: bool) -> tuple[Knob, ...]:
    """Return the knobs that can be used with a model; `guided` says whether guidance is on."""
    knobs: list[Knob] = []
    if takes_tail_drop(opened.model):
        knobs.append("drop")
        if guided:
            knobs.append("uncond")
    if not adapter_for(opened.model).inferred:
        knobs.append("merge")
    return (*knobs, "skip", "cache")


def initial_shapes(knobs: Sequence[Knob], random: np.random.Generator, denoisers: int = 1) -> Iterator[Shape]:
    """Yield shapes to start the search with, without end.

    The first is the uniform shape, then come each knob alone and all knobs together, the same at all noise levels, and
    after that random shapes.
    """
    flat: list[Shape] = [uniform_shape(knobs, denoisers), *({knob: (1.0,) * _width(knob, denoisers)} for knob in knobs)]
    flat += [{knob: (1.0,) * _width(knob, denoisers) for knob in knobs}]
    for number, shape in enumerate(flat):
        if shape not in flat[:number]:
            yield shape
    while True:
        chosen = [knob for knob in knobs if random.random() < 0.6] or [knobs[int(random.integers(len(knobs)))]]
        yield {knob: tuple(float(value) for value in random.random(_width(knob, denoisers))) for knob in chosen}


def uniform_shape(knobs: Sequence[Knob], denoisers: int = 1) -> Shape:
    """Return the uniform shape: the same tail drop at all noise levels and branches, or without one the first knob."""
    budgets = [knob for knob in knobs if knob in ("drop", "uncond")]
    return {knob: (1.0,) * _width(knob, denoisers) for knob in budgets or knobs[:1]}


def mutate(shape: Shape, knobs: Sequence[Knob], random: np.random.Generator, denoisers: int = 1) -> Shape:
    """Return a random variation of a shape: values moved a little or a lot, and sometimes a knob added or removed."""
    mutated: Shape = {}
    spread = _MUTATION_SPREADS[int(random.integers(len(_MUTATION_SPREADS)))]
    for knob in knobs:
        width = _width(knob, denoisers)
        values = shape.get(knob, (0.0,) * width)
        if random.random() < 0.15:
            values = (0.0,) * width if knob in shape else tuple(map(float, random.random(width)))
        elif knob in shape:
            moved = np.array(values) + random.normal(0.0, spread, width)
            values = tuple(float(value) for value in moved.clip(0.0, 1.0))
        if max(values) > 0.0:
            mutated[knob] = values
    return mutated or shape


def _width(knob: Knob, denoisers: int) -> int:
    """Return the number of values of a knob in a shape."""
    return denoisers if knob in ("skip", "cache") else len(LEVELS)


def search(tuner: Tuner) -> list[Trial]:
    """Search schedules: try new shapes in a third of the trials, and vary the best three in the others.

    Returns:
        The schedules that meet the target, the lowest error first.

    Raises:
        InputError: no schedule meets the target.
    """
    config, random = tuner.config, np.random.default_rng(tuner.config.seed)
    shapes, found = initial_shapes(tuner.knobs, random, len(tuner.denoisers)), list[Trial]()
    with progress("schedules", config.trials) as advance:
        for number in range(config.trials):
            best = sorted(found, key=lambda trial: trial.error)[:3]
            if best and number >= config.trials // 3:
                parent = best[number % len(best)]
                trial = tuner.meet_target(mutate(parent.turned, tuner.knobs, random, len(tuner.denoisers)), 1.0)
            else:
                trial = tuner.meet_target(next(shapes))
            if trial is not None:
                found.append(trial)
            advance(1)
    if not found:
        raise InputError(
            f"No schedule of the knobs {', '.join(tuner.knobs)} meets flops={config.flops:g}: raise flops, or allow "
            "other knobs."
        )
    return sorted(found, key=lambda trial: trial.error)


def uniform_trial(tuner: Tuner, trials: Sequence[Trial] = ()) -> Trial | None:
    """Return the uniform schedule that meets the target, from the trials of the search or tried anew; None if none."""
    shape = uniform_shape(tuner.knobs, len(tuner.denoisers))
    return next((trial for trial in trials if trial.shape == shape), None) or tuner.meet_target(shape)
