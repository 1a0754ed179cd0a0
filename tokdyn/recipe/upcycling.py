"""The `upcycle` section: which pretrained model a run begins with, and its phases."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from tokdyn.recipe.section import Positive, Section, Weight

Part = Literal["embedders", "blocks", "router", "scaffold"]


class PhaseSettings(Section):
    """A stretch of an upcycling run.

    Attributes:
        name: What the log calls it.
        steps: Its optimizer steps; null, for the last phase only, means the rest of the run.
        plan: Which tokens the blocks see: "fixed" keeps the upper left cell of every patch of the base, "learned" those
            that the router asks for, "handover" begins with the first and ends with the second, sample by sample.
        teacher: Weight of the error between the blocks' outputs and those of the frozen base, over their variance.
        output: Weight of the error between the predictions of both, over the base's variance.
        diffusion: Weight of the ordinary loss.
        frozen: What does not learn: "embedders" (of timestep and class), "blocks", "router", "scaffold" (the rest).
        lr: The learning rate is multiplied by this.
    """

    name: Annotated[str, Field(min_length=1)]
    steps: Positive | None = None
    plan: Literal["fixed", "handover", "learned"] = "learned"
    teacher: Weight = 0.0
    output: Weight = 0.0
    diffusion: Weight = 1.0
    frozen: tuple[Part, ...] = ("embedders",)
    lr: Annotated[float, Field(gt=0.0)] = 1.0

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if not (self.teacher or self.output or self.diffusion):
            raise ValueError(f"phase {self.name!r} has no loss; give it a weight for teacher, output or diffusion")
        return self


DISTILLED = (
    PhaseSettings(name="distill", steps=5000, plan="fixed", teacher=1.0),
    PhaseSettings(name="handover", steps=500, plan="handover", teacher=1.0),
    PhaseSettings(name="finetune"),
)
"""Distillation against the base on a fixed plan, a short hand-over to the router, then ordinary training."""


class UpcycleSettings(Section):
    """How a model begins with another one (arXiv 2603.06351, upcycling).

    Attributes:
        base: A named base, a file or a folder; see `tokdyn models`.
        ema: Take the averaged weights of a base that holds both.
        phases: In order; the last one lasts until the end of the run.
    """

    base: Annotated[str, Field(min_length=1)]
    ema: bool = True
    phases: Annotated[tuple[PhaseSettings, ...], Field(min_length=1)] = DISTILLED

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        for phase in self.phases[:-1]:
            if phase.steps is None:
                raise ValueError(f"phase {phase.name!r} has no steps; only the last one may last until the end")
        if self.phases[-1].steps is not None:
            raise ValueError(
                f"phase {self.phases[-1].name!r} is the last one; leave its steps out, it lasts to the end"
            )
        return self

    def phase(self, step: int) -> tuple[PhaseSettings, float]:
        """The phase of a step, and how much of it has passed, in [0, 1).

        Args:
            step: Steps already taken.
        """
        for phase in self.phases:
            if phase.steps is None or step < phase.steps:
                return phase, 0.0 if phase.steps is None else step / phase.steps
            step -= phase.steps
        raise AssertionError("the last phase has no end")

    @property
    def compares(self) -> bool:
        """Whether any phase looks at the base."""
        return any(phase.teacher or phase.output for phase in self.phases)
