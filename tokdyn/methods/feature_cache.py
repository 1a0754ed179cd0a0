"""Skipping the blocks in steps where their input has hardly changed, and reusing the effect of an earlier step.

TeaCache, arXiv 2411.19108; the first-block variant is ParaAttention's.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tokdyn.errors import InputError
from tokdyn.methods.base import Method, Stage, Traits
from tokdyn.methods.registry import register_method

TEACACHE_FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
"""Coefficients published with TeaCache (arXiv 2411.19108) for FLUX.1-dev and the indicator "input".

With the thresholds 0.25, 0.4, 0.6 and 0.8 the authors measured speed-ups of 1.5, 1.8, 2.0 and 2.25.
"""

FITTED_FOR: dict[tuple[float, ...], str] = {TEACACHE_FLUX: "FluxTransformer2DModel"}
"""The class of the models that published coefficients were fitted for; `wrap` warns about others."""


@register_method
class FeatureCache(Method):
    """Settings of feature caching. It acts in sampling only. Nothing is trained; calibration may fit the polynomial.

    The effect of the blocks, their output minus their input, is remembered for each guidance branch. A sample whose
    indicator has changed by less than the threshold since its last computed step skips the blocks and gets that effect.

    Attributes:
        threshold: accumulated relative change of the indicator below which a step is cached; at 0 or less every step is
            computed.
        indicator: the tensor that is compared from step to step: the modulated "input" of the first block, or the
            effect of the "first_block", which then runs in every step.
        coefficients: polynomial that maps the relative change of the indicator to that of the output, highest degree
            first; (1, 0) is the identity.
        steps: the steps to compute, counted from 0; all others are cached, and the indicator is not used. None decides
            by the threshold.
        num_steps: number of steps of the sampler, so that the last one is always computed; None if unknown. Within
            `tokdyn.trajectory(model, steps=N)`, N goes before it, and is enough unless `steps` lists the computed ones.
        extrapolate: extrapolate the last two computed effects linearly in the noise level, instead of repeating one.
        fingerprint: identifies the model and sampler that the polynomial was calibrated with; others raise a warning.
    """

    aliases: ClassVar[tuple[str, ...]] = ("cache", "teacache")

    threshold: float = 0.1
    indicator: Literal["input", "first_block"] = "input"
    coefficients: tuple[float, ...] = (1.0, 0.0)
    steps: tuple[int, ...] | None = None
    num_steps: int | None = Field(default=None, ge=1)
    extrapolate: bool = False
    fingerprint: str | None = None

    @model_validator(mode="after")
    def _fits(self) -> FeatureCache:
        if not self.coefficients:
            raise InputError("coefficients are empty; give those of a polynomial, such as (1, 0), the identity.")
        if self.steps is not None and (0 not in self.steps or sorted(set(self.steps)) != [*self.steps]):
            raise InputError(f"steps are {self.steps}; give the steps to compute in ascending order, 0 among them.")
        return self

    @property
    def compares(self) -> bool:
        """Whether the change of the indicator decides which steps are cached."""
        return self.steps is None and self.threshold > 0

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
            reads="split",
            compares=self.compares,
            diverges=self.compares,
            owns=owns | ({"skipping": frozenset({0})} if first else {}),
        )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Return one example for each indicator."""
        return cls(), cls(indicator="first_block")
