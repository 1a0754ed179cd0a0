"""Reusing what the blocks did in an earlier step when their input has hardly changed.

Source: TeaCache, arXiv 2411.19108; the first-block variant is ParaAttention's.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from tokdyn.errors import InputError
from tokdyn.methods.base import Method, Stage, Traits
from tokdyn.methods.registry import register_method

TEACACHE_FLUX = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
"""Coefficients published with TeaCache (arXiv 2411.19108) for FLUX.1-dev and the indicator "input".

Published with thresholds 0.25, 0.4, 0.6 and 0.8, for 1.5, 1.8, 2.0 and 2.25 times the speed.
"""


@register_method
class FeatureCache(Method):
    """Settings of feature caching. Acts in sampling only; a calibration fits the polynomial, nothing is trained.

    Attributes:
        threshold: accumulated change below which a step reuses the last output; 0 or less never does.
        indicator: what is compared from step to step: the modulated "input" of the first block, or the residual of the
            "first_block", which then runs in every step.
        coefficients: polynomial of the change, highest degree first; (1, 0) takes the change as it is.
        steps: compute exactly these steps, counted from 0, and no others; the indicator is not used then.
        num_steps: steps of the sampler; with it, the last step is always computed.
        extrapolate: continue the last two computed outputs in a straight line instead of repeating the last.
        fingerprint: what the polynomial was calibrated on; another model or sampler is warned about.
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
            raise InputError("coefficients are empty; (1, 0) takes the change as it is.")
        if self.steps is not None and (0 not in self.steps or sorted(set(self.steps)) != [*self.steps]):
            raise InputError(f"steps are {self.steps}; give the computed steps in rising order, 0 among them.")
        return self

    @property
    def compares(self) -> bool:
        """Whether the change of the indicator decides; otherwise steps are set, or none is ever reused."""
        return self.steps is None and self.threshold > 0

    def traits(self, depth: int) -> Traits:
        """Memory of the whole stack from step to step, while sampling; an indicator must be computed in every step."""
        first = self.indicator == "first_block"
        owns: dict[str, frozenset[int] | None] = {"residual of the stack": None}
        return Traits(
            Stage.STACK,
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
        """Compare the input of the first block, and what it adds."""
        return cls(), cls(indicator="first_block")
