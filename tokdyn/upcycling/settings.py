"""The `upcycle` section: which pretrained model a run begins with, and its phases."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tokdyn.methods import Method
from tokdyn.methods.written import from_written
from tokdyn.section import Positive, Section, Weight

Part = Literal["embedders", "blocks", "router", "methods", "scaffold"]


class AttachedMethod(BaseModel):
    """A method that is attached to the model while it trains, with its settings beside its name.

    Its warm-up counts optimizer steps here, however many calls of the model each of them takes.

    Attributes:
        method: "DynamicWidth".
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    method: Literal["DynamicWidth"]

    @model_validator(mode="after")
    def _builds(self) -> Self:
        self.build()  # an InputError is a ValueError
        return self

    def build(self) -> Method:
        """The method."""
        return from_written({"method": self.method, **(self.__pydantic_extra__ or {})})


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
        complete: Weight of the same loss of the model with its methods off, on the same noisy images: what DyDiT
            (arXiv 2410.03456) keeps the whole network trained with.
        frozen: What does not learn: "embedders" (of timestep and class), "blocks", "router", "methods" (the trained
            parts of attached ones), "scaffold" (the rest).
        lr: The learning rate is multiplied by this.
    """

    name: Annotated[str, Field(min_length=1)]
    steps: Positive | None = None
    plan: Literal["fixed", "handover", "learned"] = "learned"
    teacher: Weight = 0.0
    output: Weight = 0.0
    diffusion: Weight = 1.0
    complete: Weight = 0.0
    frozen: tuple[Part, ...] = ("embedders",)
    lr: Annotated[float, Field(gt=0.0)] = 1.0

    @model_validator(mode="after")
    def _learns(self) -> Self:
        if not (self.teacher or self.output or self.diffusion or self.complete):
            raise ValueError(f"phase {self.name!r} has no loss; give it a weight for teacher, output or diffusion")
        return self


class AfterSettings(Section):
    """A method that is put on the model when its training is over.

    Attributes:
        method: "cache" and "skip" are calibrated on images that the model draws, "merge" is attached as it is.
        flops: Share of the FLOPs that a calibration comes down to; skip needs one, null leaves a cache its threshold.
        ratio: Of merge, the share of the tokens that are merged.
        steps: Model calls per image of the calibration, as in sampling later.
        guidance: The same for the scale of guidance.
        count: Images that are drawn.
    """

    method: Literal["cache", "skip", "merge"]
    flops: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    steps: Positive = 50
    guidance: Annotated[float, Field(ge=1.0)] = 1.0
    count: Positive = 8

    @model_validator(mode="after")
    def _has_a_target(self) -> Self:
        if self.method == "skip" and self.flops is None:
            raise ValueError("skip needs a share of the FLOPs to come down to, such as flops=0.7")
        if self.method == "merge" and self.flops is not None:
            raise ValueError("merge has a ratio and no flops; leave them out")
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
        methods: Attached to the model while it trains, outermost first, and saved beside it.
        after: Put on the model when it is trained, and written to `methods` in its folder.
        phases: In order; the last one lasts until the end of the run.
    """

    base: Annotated[str, Field(min_length=1)]
    ema: bool = True
    methods: tuple[AttachedMethod, ...] = ()
    after: tuple[AfterSettings, ...] = ()
    phases: Annotated[tuple[PhaseSettings, ...], Field(min_length=1)] = DISTILLED

    @model_validator(mode="after")
    def _lengths(self) -> Self:
        for phase in self.phases[:-1]:
            if phase.steps is None:
                raise ValueError(f"phase {phase.name!r} has no steps; only the last one may last until the end")
        for listed in (self.methods, self.after):
            names = [each.method for each in listed]
            if len(set(names)) < len(names):
                raise ValueError(f"the methods {', '.join(names)} are listed twice; name each once")
        if any(phase.complete for phase in self.phases) and not self.methods:
            raise ValueError("complete compares the model without its methods, and there are none; leave it out")
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

    def shares(self, steps: int) -> list[tuple[PhaseSettings, float]]:
        """The phases that a run comes to, each with its share of the steps.

        Args:
            steps: of the run.
        """
        shares, left = [], steps
        for phase in self.phases:
            taken = left if phase.steps is None else min(phase.steps, left)
            shares.append((phase, taken / steps))
            left -= taken
        return shares

    @property
    def compares(self) -> bool:
        """Whether any phase looks at the base."""
        return any(phase.teacher or phase.output for phase in self.phases)
