"""Skipping the blocks in steps where their input has hardly changed, and reusing the effect of an earlier step.

TeaCache, arXiv 2411.19108; the first-block variant is ParaAttention's.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from tokdyn.errors import InputError
from tokdyn.method_names import ALIASES
from tokdyn.methods.base import Method, Stage, Traits
from tokdyn.methods.registry import register_method

TEACACHE_FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
"""Coefficients published with TeaCache (arXiv 2411.19108) for FLUX.1-dev and the indicator "input".

With the thresholds 0.25, 0.4, 0.6 and 0.8 the authors measured speed-ups of 1.5, 1.8, 2.0 and 2.25.
"""


@register_method
class FeatureCache(Method):
    """Settings of feature caching. It acts in sampling only. Nothing is trained; calibration may fit the polynomial.

    The effect of the blocks, their output minus their input, is remembered for each guidance branch. A sample whose
    indicator has changed by less than the threshold since its last computed step skips the blocks and gets that effect.

    Attributes:
        threshold: what a rule accumulates from step to step, such as the relative change of the indicator, is compared
            with it: below it a step is cached. At 0 or less every step is computed.
        rule: how it is decided which steps are cached, unless `steps` lists the computed ones: "teacache" accumulates
            the change of the indicator; "magcache" the change of the length of the effect, which it takes from
            `ratios`; "easycache" a change of the output that it predicts from that of the input; "seacache" the
            change of the input after a filter that keeps the frequencies which are not noise.
        indicator: the tensor that is compared from step to step: the modulated "input" of the first block, the effect
            of the "first_block", which then runs in every step, the embedding of the timestep ("time"), the same for
            every prompt, or its projection to the modulation of the blocks ("projected_time").
        coefficients: polynomial that maps the relative change of the indicator to that of the output, highest degree
            first; (1, 0) is the identity.
        ratios: for "magcache", the length of a token's effect in each step of a calibrated run, divided by that in the
            step before, averaged over tokens; the first is 1. They are resampled to other numbers of steps.
        steps: the steps to compute, counted from 0; all others are cached, and the indicator is not used. None decides
            by the threshold.
        num_steps: number of steps of the sampler, so that the last one is always computed; None if unknown. Within
            `tokdyn.trajectory(model, steps=N)`, N goes before it, and is enough unless `steps` lists the computed ones.
        warmup: computed first in every trajectory, as a number of steps (an int) or as a share of them (a float).
        start: the first step that may be cached, likewise; the later one of `warmup` and `start` counts.
        end: the first step from which on all are computed again, likewise; 1.0 is the end of the trajectory.
        max_reused: cached steps in a row; None does not limit them.
        forecast: 0 repeats the last computed effect; others forecast it in the noise level, from the computed steps
            before: 1 and 2 by a Taylor expansion of this order, 1 along a straight line (TaylorSeer, arXiv 2503.06923);
            "chebyshev" by a fit of Chebyshev polynomials to up to ten of them (Spectrum, arXiv 2603.01623).
        residual_dtype: type in which effects are kept; None is that of the tokens. In "float16" and "float8_e4m3fn"
            each token has a scale of its own.
        residual_device: "host" keeps effects in the memory of the host, pinned beside a CUDA device, and copies them
            back to use them; None keeps them where the tokens are.
        fingerprint: identifies the model and sampler that the polynomial was calibrated with; others raise a warning.
    """

    aliases: ClassVar[tuple[str, ...]] = ALIASES["FeatureCache"]

    threshold: float = Field(default=0.1, allow_inf_nan=True)
    rule: Literal["teacache", "magcache", "easycache", "seacache"] = "teacache"
    indicator: Literal["input", "first_block", "time", "projected_time"] = "input"
    coefficients: tuple[float, ...] = (1.0, 0.0)
    ratios: tuple[float, ...] | None = None
    steps: tuple[int, ...] | None = None
    num_steps: int | None = Field(default=None, ge=1)
    warmup: int | float = 0
    start: int | float = 0
    end: int | float = 1.0
    max_reused: int | None = Field(default=None, ge=1)
    forecast: Literal[0, 1, 2, "chebyshev"] = 0
    residual_dtype: Literal["float32", "bfloat16", "float16", "float8_e4m3fn"] | None = None
    residual_device: Literal["host"] | None = None
    fingerprint: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _reads_extrapolate(cls, settings: Any) -> Any:
        """Read `extrapolate`, the name of `forecast` while it was True or False, in saved settings."""
        if not isinstance(settings, Mapping) or "extrapolate" not in settings:
            return settings
        settings = dict(settings)
        before = settings.pop("extrapolate")
        if "forecast" in settings or not isinstance(before, bool):
            raise InputError("extrapolate is called forecast: write forecast=1 for extrapolate=True, or leave it out.")
        return settings | {"forecast": int(before)}

    @model_validator(mode="after")
    def _fits(self) -> FeatureCache:
        if math.isnan(self.threshold):
            raise InputError("threshold is NaN; give a number, or infinity to cache every step that may be cached.")
        if not self.coefficients or not all(map(math.isfinite, self.coefficients)):
            raise InputError(
                f"coefficients are {self.coefficients}; give finite ones of a polynomial, such as (1, 0), the identity."
            )
        if self.steps is not None and (self.steps[:1] != (0,) or sorted(set(self.steps)) != [*self.steps]):
            raise InputError(f"steps are {self.steps}; give the steps to compute in ascending order, from 0 on.")
        if self.steps is not None and self.num_steps is not None and self.steps[-1] >= self.num_steps:
            raise InputError(
                f"steps lists {self.steps[-1]}, but num_steps={self.num_steps}; list steps below that, from 0 on."
            )
        return self

    @model_validator(mode="after")
    def _suits_its_rule(self) -> FeatureCache:
        if self.rule != "teacache":
            if self.indicator != "input" or self.coefficients != (1.0, 0.0):
                raise InputError(f"rule={self.rule!r} has no use for indicator and coefficients; leave them out.")
            if self.steps is not None:
                raise InputError(
                    f"steps are listed, so rule={self.rule!r} has nothing to decide; leave one of them out."
                )
        if (self.rule == "magcache") != (self.ratios is not None):
            raise InputError(
                "ratios belong to rule='magcache', which needs them: one for each step of a calibrated run."
            )
        if self.ratios is not None and not (
            self.ratios and all(math.isfinite(ratio) and ratio > 0 for ratio in self.ratios)
        ):
            raise InputError(f"ratios are {self.ratios}; give a positive number for each step of a calibrated run.")
        return self

    @model_validator(mode="after")
    def _has_a_window(self) -> FeatureCache:
        for name in ("warmup", "start", "end"):
            value = getattr(self, name)
            if not (value >= 0 if isinstance(value, int) else 0 <= value <= 1):
                raise InputError(f"{name}={value} is neither a number of steps (0, 1, 2, ...) nor a share from 0 to 1.")
        for name in ("start", "warmup"):
            first = getattr(self, name)
            least = max(first, 1) if isinstance(self.end, int) and isinstance(first, int) else first
            if not self.end or (type(least) is type(self.end) and least >= self.end):
                raise InputError(f"{name}={first} is not before end={self.end}, so no step could be reused.")
        narrow = self.warmup or self.start or self.end != 1
        if self.num_steps is not None and narrow and not self.window(self.num_steps):
            raise InputError(
                f"warmup={self.warmup}, start={self.start} and end={self.end} leave none of num_steps={self.num_steps} "
                "steps to be cached (the last is always computed)."
            )
        if self.steps is not None and (narrow or self.max_reused is not None):
            raise InputError("steps are listed, so warmup, start, end and max_reused have no effect; leave them out.")
        return self

    @property
    def decides(self) -> bool:
        """Whether a rule decides which steps are cached; not if `steps` lists them, or if no step is."""
        return self.steps is None and self.threshold > 0

    @property
    def needs_indicator(self) -> bool:
        """Whether the rule compares the indicators of two steps; MagCache's looks up ratios."""
        return self.decides and self.rule != "magcache"

    @property
    def compares(self) -> bool:
        """Whether the rule compares tensors that depend on the image: tokens, or what goes into the model."""
        return self.needs_indicator and self.indicator not in ("time", "projected_time")

    def window(self, count: int | None) -> range:
        """Return the steps that may be cached; the first and, where it is known, the last step are not among them.

        Args:
            count: number of steps of the trajectory; None if unknown.

        Raises:
            InputError: a setting is a share of a number of steps that is unknown.
        """
        if count is None:
            shares = {"warmup": self.warmup, "start": self.start, "end": self.end if self.end != 1 else 0}
            name = next((name for name, value in shares.items() if isinstance(value, float) and value), None)
            name = "rule='magcache'" if self.rule == "magcache" else name and f"{name}={shares[name]}"
            if name:
                raise InputError(
                    f"FeatureCache({name}) needs the number of steps, which is unknown here; set num_steps=, or call "
                    "the model within tokdyn.trajectory(model, steps=N)."
                )
        last = sys.maxsize if count is None else count
        bounds = (self.warmup, self.start, self.end)
        warmup, start, end = (value if isinstance(value, int) else math.floor(value * last + 1e-9) for value in bounds)
        return range(max(warmup, start, 1), min(end, last if count is None else last - 1))

    def traits(self, depth: int) -> Traits:
        """Return the traits: in sampling, the effect of all blocks, or of all but the first, is kept between steps."""
        first = self.indicator == "first_block"
        owns: dict[str, frozenset[int] | None] = {"residual of all blocks": None}
        return Traits(
            Stage.BLOCKS,
            span=(1, depth - 1) if first else None,
            remembers=True,
            needs_level=True,
            phases=frozenset({"sample"}),
            needs_grid=self.rule == "seacache",
            reads="grid" if self.rule == "seacache" else "split",
            compares=self.compares,
            embedding=self.indicator if self.decides and self.indicator in ("time", "projected_time") else None,
            diverges=self.compares,
            owns=owns | ({"skipping": frozenset({0})} if first else {}),
            idle_in=self._idle_in,
        )

    def _idle_in(self, count: int) -> str | None:
        """Return why no step of a trajectory of `count` steps is ever cached; None if one may be."""
        if self.steps is not None or not self.decides or self.window(count):
            return None
        return (
            f"warmup={self.warmup}, start={self.start} and end={self.end} leave none of {count} steps to be cached"
            " (the last is always computed)"
        )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Return examples of where the cache opens, and of all rules, each with another forecast.

        Whether a model has an embedding of the timestep is known only of the model itself, so there is none of those.
        """
        return (
            cls(),
            cls(indicator="first_block"),
            cls(rule="seacache", forecast=1),
            cls(rule="easycache", forecast="chebyshev"),
            cls(rule="magcache", ratios=(1.0, 0.9, 0.8, 0.7), num_steps=4, forecast=2),
        )
