"""Schedules that meet a FLOPs target, and a search among them by a cheap proxy."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokdyn.adapters import adapter_for
from tokdyn.attach import attachment_of, unwrap
from tokdyn.bench.stacks import Opened, Stack, attach
from tokdyn.bench.tune_settings import Knob, TuneConfig
from tokdyn.calibration.caching import calibrate_cache
from tokdyn.calibration.recording import recording
from tokdyn.calibration.skipping import calibrate_skipping
from tokdyn.diffusion.guidance import takes_tail_drop
from tokdyn.diffusion.sampling import generate
from tokdyn.errors import InputError, RecipeError, TokdynError
from tokdyn.host import product_type
from tokdyn.methods import DepthSkip, FeatureCache
from tokdyn.methods.registry import to_settings
from tokdyn.progress import progress
from tokdyn.sample.costs import step_costs

LEVELS = (0.0, 0.5, 1.0)
"""Noise levels between which curves run in straight lines."""
_MOST = {"drop": 0.95, "uncond": 0.95, "merge": 0.7}
_SKIPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)  # shares of the FLOPs that tables of blocks are calibrated for
_CACHED = 0.2  # share of the steps whose blocks run when the cache is turned all the way
_CLOSE = 0.003  # below the target, in shares of the FLOPs
_FAR = 0.05  # below the target, for knobs that turn in jumps
_ATTEMPTS = 9
_SPREADS = (0.08, 0.3)  # of mutations, near and far


Shape = dict[Knob, tuple[float, ...]]
"""How strongly each knob is turned, in [0, 1]: one number per level of a curve, or one for a calibrated method."""


@dataclass(frozen=True)
class Trial:
    """A schedule that was tried.

    Attributes:
        shape: of the knobs, before they are turned together until the target is met.
        strength: by how much they are.
        stack: what that comes to.
        flops: share of the FLOPs that is left.
        error: squared distance to the images of the model as it is, over their variance.
    """

    shape: Shape
    strength: float
    stack: Stack
    flops: float
    error: float

    @property
    def turned(self) -> Shape:
        """The shape as it is when its knobs are turned by the strength."""
        return {knob: tuple(min(self.strength * value, 1.0) for value in values) for knob, values in self.shape.items()}


@dataclass
class Tuner:
    """A model with what is known of it.

    Attributes:
        config: the settings.
        opened: the model, on its device.
        knobs: that fit it.
        plain: (B, C, H, W) its images.
        whole: 1e9 FLOPs of one of them.
        caches: the calibrated cache, with the threshold at which as few steps are computed as the search may ask for.
        skips: calibrated tables, the one that skips least first.
    """

    config: TuneConfig
    opened: Opened
    knobs: tuple[Knob, ...]
    plain: Tensor = field(init=False)
    whole: float = field(init=False)
    caches: FeatureCache | None = None
    skips: tuple[DepthSkip, ...] = ()

    def prepare(self) -> None:
        """Draw the images of the model as it is, and calibrate on its calls."""
        bare = replace(self.opened, model=copy.deepcopy(self.opened.model))
        with recording(bare.model, host=True) as calls:
            self.plain, self.whole = self._draw(bare)
        if attachment_of(bare.model) is not None:  # what is calibrated is the model at full width
            unwrap(bare.model)
        least = max(_CACHED, 1.5 / self.config.steps)  # the first step is always computed
        if "cache" in self.knobs and least < 1.0:
            self.caches = calibrate_cache(bare.model, calls, FeatureCache(), steps=least).method
        if "skip" in self.knobs:
            tables = []
            for share in _SKIPS:
                try:
                    tables.append(calibrate_skipping(bare.model, calls, DepthSkip(), share).method)
                except InputError:  # what always runs costs more than that
                    break
            self.skips = tuple(tables)

    def stack(self, shape: Shape, strength: float, name: str = "tuned") -> Stack:
        """The schedule that a shape comes to when all of its knobs are turned by the same factor."""
        turned = {knob: [strength * value for value in values] for knob, values in shape.items()}
        methods: list[dict[str, Any]] = []
        if self.caches is not None and "cache" in turned and turned["cache"][0] > 0:
            share = min(turned["cache"][0], 1.0)
            methods.append(to_settings(self.caches.model_copy(update={"threshold": share * self.caches.threshold})))
        if "merge" in turned and max(turned["merge"]) > 0:
            methods.append({"method": "TokenMerge", "ratio": _points(turned["merge"], _MOST["merge"])})
        if self.skips and "skip" in turned:
            place = round(min(turned["skip"][0], 1.0) * len(self.skips))
            methods += [to_settings(self.skips[place - 1])] if place else []
        given: dict[str, Any] = {}
        if "drop" in turned:
            given["tail_drop"] = _points(turned["drop"], _MOST["drop"])
        if "uncond" in turned:
            given["uncond_tail_drop"] = _points(turned["uncond"], _MOST["uncond"])
        return Stack(name=name, model=self.config.model, methods=tuple(methods), **given)

    def met(self, shape: Shape, guess: float | None = None) -> Trial | None:
        """Turn the knobs of a shape until what is spent is at most the target, and less by no more than 0.3% of all.

        Between what was tried on either side of the target the FLOPs are taken to fall in a straight line.

        Args:
            shape: of the schedule.
            guess: a strength to begin with, in place of the largest.

        Returns:
            Where the knobs turn in jumps, the nearest below the target that was seen; None where they do not come down
            to it, or only by 5% of all or more below it.
        """
        target, most, best = self.config.flops, 1.0 / max(max(values) for values in shape.values()), None
        low, above, high, below = 0.0, 1.0, most, 0.0  # strengths, and the FLOPs at these
        strength, sides = most if guess is None else min(guess, most), list[bool]()
        for _ in range(_ATTEMPTS):
            made = self._tried(shape, strength)
            if made is None or (strength == most and made.flops > target):
                return None
            sides.append(made.flops <= target)
            if made.flops > target:
                low, above = strength, made.flops
            else:
                high, below = strength, made.flops
                best = made if best is None or made.flops > best.flops else best
                if made.flops >= target - _CLOSE:
                    break
            if best is None:  # along the line from nothing to here, and a little further
                strength = min(most, 1.05 * strength * (1.0 - target) / max(1.0 - made.flops, 1e-6))
                continue
            part = (above - target + _CLOSE / 2) / max(above - below, 1e-6)
            if len(sides) > 2 and len(set(sides[-3:])) == 1:  # the line is no good guess here
                part = 0.5
            strength = low + (high - low) * min(max(part, 0.05), 0.95)
        return best if best is not None and best.flops >= target - _FAR else None

    def _tried(self, shape: Shape, strength: float) -> Trial | None:
        stack = self.stack(shape, strength)
        try:
            other = replace(self.opened, stack=stack, model=attach(copy.deepcopy(self.opened.model), stack))
        except TokdynError:  # methods that do not go together on this model
            return None
        images, spent = self._draw(other)
        apart = (images - self.plain).square().mean() / self.plain.var().clamp(min=1e-12)
        return Trial(shape, strength, stack, spent / self.whole, float(apart))

    def _draw(self, opened: Opened) -> tuple[Tensor, float]:
        """Images of the proxy, and 1e9 FLOPs of one of them."""
        config, device = self.config, next(opened.model.parameters()).device
        sampler = opened.sampler(config.scheduler, config.steps, config.guidance)
        whole = opened.labels(config.images)
        images, spent = [], 0.0
        for start in range(0, config.images, config.batch_size):
            seeds = list(range(start, min(start + config.batch_size, config.images)))
            labels = [whole[seed] for seed in seeds]
            made = generate(
                opened.model, sampler, opened.objective, labels, [config.seed + seed for seed in seeds],
                dtype=product_type(config.precision, device),
            )  # fmt: skip
            costs = [cost.gflops for cost in step_costs(opened.model, made.steps, len(seeds))]
            known = [cost for cost in costs if cost is not None]
            if len(known) < len(costs):
                raise RecipeError(f"{config.steps} steps are more than statistics hold; choose fewer steps.")
            spent += sum(known) * len(seeds)
            images.append(made.images.cpu())
        return torch.cat(images), spent / config.images


def _points(values: Sequence[float], most: float) -> Any:
    """A curve, or a number where it is the same at all levels; values stay below what makes sense."""
    bounded = [round(min(max(value, 0.0), most), 4) for value in values]
    return bounded[0] if len(set(bounded)) == 1 else tuple(zip(LEVELS, bounded, strict=True))


def fitting(opened: Opened, guided: bool) -> tuple[Knob, ...]:
    """The knobs that can be turned on a model."""
    found: list[Knob] = []
    if takes_tail_drop(opened.model):
        found.append("drop")
        if guided:
            found.append("uncond")
    if not adapter_for(opened.model).inferred:
        found.append("merge")
    return (*found, "skip", "cache")


def shapes(knobs: Sequence[Knob], random: np.random.Generator) -> Iterator[Shape]:
    """Where the search begins: the uniform one, every knob alone and flat, all together, then at random."""
    flat: list[Shape] = [even(knobs), *({knob: (1.0,) * _width(knob)} for knob in knobs)]
    flat += [{knob: (1.0,) * _width(knob) for knob in knobs}]
    for number, shape in enumerate(flat):
        if shape not in flat[:number]:
            yield shape
    while True:
        chosen = [knob for knob in knobs if random.random() < 0.6] or [knobs[int(random.integers(len(knobs)))]]
        yield {knob: tuple(float(value) for value in random.random(_width(knob))) for knob in chosen}


def even(knobs: Sequence[Knob]) -> Shape:
    """The uniform shape, as without a search: one tail drop for everything, or the first knob by itself."""
    budgets = [knob for knob in knobs if knob in ("drop", "uncond")]
    return {knob: (1.0,) * _width(knob) for knob in budgets or knobs[:1]}


def mutated(shape: Shape, knobs: Sequence[Knob], random: np.random.Generator) -> Shape:
    """A neighbour of a shape, near or far: its values moved, sometimes a knob let go or taken up."""
    found: Shape = {}
    spread = _SPREADS[int(random.integers(len(_SPREADS)))]
    for knob in knobs:
        values = shape.get(knob, (0.0,) * _width(knob))
        if random.random() < 0.15:
            values = (0.0,) * _width(knob) if knob in shape else tuple(map(float, random.random(_width(knob))))
        elif knob in shape:
            moved = np.array(values) + random.normal(0.0, spread, _width(knob))
            values = tuple(float(value) for value in moved.clip(0.0, 1.0))
        if max(values) > 0.0:
            found[knob] = values
    return found or shape


def _width(knob: Knob) -> int:
    return 1 if knob in ("skip", "cache") else len(LEVELS)


def search(tuner: Tuner) -> list[Trial]:
    """A third of the trials look around, the others around the best three so far; the best first.

    Raises:
        InputError: no schedule comes down to the target.
    """
    config, random = tuner.config, np.random.default_rng(tuner.config.seed)
    begin, found = shapes(tuner.knobs, random), list[Trial]()
    with progress("schedules", config.trials) as advance:
        for number in range(config.trials):
            best = sorted(found, key=lambda trial: trial.error)[:3]
            if best and number >= config.trials // 3:
                parent = best[number % len(best)]
                made = tuner.met(mutated(parent.turned, tuner.knobs, random), 1.0)
            else:
                made = tuner.met(next(begin))
            if made is not None:
                found.append(made)
            advance(1)
    if not found:
        raise InputError(
            f"no schedule of {', '.join(tuner.knobs)} comes down to {config.flops:g} of the FLOPs: ask for more, or "
            "allow other knobs."
        )
    return sorted(found, key=lambda trial: trial.error)


def uniform(tuner: Tuner, trials: Sequence[Trial] = ()) -> Trial | None:
    """The uniform schedule that meets the target: the one among the trials, where the search has come by it."""
    shape = even(tuner.knobs)
    return next((trial for trial in trials if trial.shape == shape), None) or tuner.met(shape)
