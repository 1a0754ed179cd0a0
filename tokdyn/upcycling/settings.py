"""Define the section `upcycle` of a recipe: the base, the phases of the run, and the methods to train or to attach.

The base is the pretrained model; the student is made from it, and trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from tokdyn.errors import RecipeError
from tokdyn.method_names import full_name, short_name
from tokdyn.section import Positive, Section, Weight

if TYPE_CHECKING:
    from tokdyn.methods import Method

Part = Literal["embedders", "blocks", "router", "methods", "scaffold"]
TRAINED = ("dc", "dydit")
"""Methods that upcycling trains, by their names in `tokdyn.upcycle` and `tokdyn upcycle --method`."""


class AttachedMethod(BaseModel):
    """A method that is attached to the student while it trains.

    The settings of the method stand beside `method`. A warm-up is given in optimizer steps.

    Attributes:
        method: Name of the method: "DynamicWidth", or "dydit" for short.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    method: Annotated[Literal["DynamicWidth"], BeforeValidator(full_name)]

    @model_validator(mode="after")
    def _builds(self) -> Self:
        self.build()  # an InputError is a ValueError, which pydantic reports with the key
        return self

    def build(self) -> Method:
        """Build the method from its settings."""
        from tokdyn.methods.registry import from_settings

        return from_settings({"method": self.method, **(self.__pydantic_extra__ or {})})


class PhaseSettings(Section):
    """A phase of an upcycling run.

    Attributes:
        name: Name of the phase in messages.
        steps: Number of optimizer steps; null for the last phase, which lasts until the end of the run.
        plan: Tokens that the student keeps: "fixed" keeps one per patch of the base, in its upper left corner;
            "learned" keeps those that the router chooses; "handover" moves from the first to the second, sample by
            sample.
        teacher: Weight of the error between the outputs of the student's blocks and those of the frozen base, divided
            by the variance of the base's in each image.
        output: Weight of the error between the student's prediction and the base's, divided by the variance of the
            base's in each image.
        diffusion: Weight of the diffusion loss.
        complete: Weight of the diffusion loss of the student with its methods disabled, on the same noisy images, with
            which DyDiT (arXiv 2410.03456) keeps the whole network trained.
        frozen: Parts that are not trained: "embedders" (of timestep and class), "blocks", "router", "methods"
            (parameters of attached methods), "scaffold" (everything else).
        lr: Factor that the learning rate is multiplied by.
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
    def _has_a_loss(self) -> Self:
        if not (self.teacher or self.output or self.diffusion or self.complete):
            raise ValueError(
                f"phase {self.name!r} has no loss; give it a weight for teacher, output, diffusion or complete"
            )
        return self


class AfterSettings(Section):
    """A method that is attached to the student after its training.

    Attributes:
        method: "cache" or "skip", which are calibrated on images that the student draws, or "merge", which needs no
            calibration.
        flops: Target of the calibration, as a share of the FLOPs; required for skip. For a cache, null keeps its
            default threshold.
        ratio: Share of the tokens that merge merges.
        steps: Sampling steps per image during the calibration; use as many as for sampling later.
        guidance: Guidance scale during the calibration; use the same as for sampling later.
        count: Number of images that the calibration draws.
    """

    method: Annotated[Literal["cache", "skip", "merge"], BeforeValidator(short_name)]
    flops: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    steps: Positive = 50
    guidance: Annotated[float, Field(ge=1.0)] = 1.0
    count: Positive = 8

    @model_validator(mode="after")
    def _has_the_right_target(self) -> Self:
        if self.method == "skip" and self.flops is None:
            raise ValueError("skip needs a share of the FLOPs as its target; add flops=0.7, for example")
        if self.method == "merge" and self.flops is not None:
            raise ValueError(
                "merge has no setting flops; remove it, and set ratio to choose how many tokens are merged"
            )
        return self


DISTILLED = (
    PhaseSettings(name="distill", steps=5000, plan="fixed", teacher=1.0),
    PhaseSettings(name="handover", steps=500, plan="handover", teacher=1.0),
    PhaseSettings(name="finetune"),
)
"""The default phases: distillation on the fixed plan, a short handover to the router, then ordinary training."""


class UpcycleSettings(Section):
    """The settings of a run that starts from a pretrained model (upcycling, arXiv 2603.06351).

    Attributes:
        base: The pretrained model: a name that `tokdyn models` lists, a file, a folder or a hub id.
        ema: Take the averaged weights if the base holds averaged and plain ones.
        methods: Methods to attach while the student trains, outermost first. They are saved beside its weights.
        after: Methods to attach after the training. They are saved in the folder `methods` of the run.
        phases: The phases in order; the last one lasts until the end of the run.
    """

    base: Annotated[str, Field(min_length=1)]
    ema: bool = True
    methods: tuple[AttachedMethod, ...] = ()
    after: tuple[AfterSettings, ...] = ()
    phases: Annotated[tuple[PhaseSettings, ...], Field(min_length=1)] = DISTILLED

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        for phase in self.phases[:-1]:
            if phase.steps is None:
                raise ValueError(f"phase {phase.name!r} has no steps; set them, only the last phase may have none")
        for methods in (self.methods, self.after):
            names = [each.method for each in methods]
            if len(set(names)) < len(names):
                raise ValueError(f"the methods {', '.join(names)} repeat one; name each once")
        if any(phase.complete for phase in self.phases) and not self.methods:
            raise ValueError(
                "complete has no effect, because upcycle.methods is empty and there is nothing to disable; remove it"
            )
        if self.phases[-1].steps is not None:
            raise ValueError(
                f"phase {self.phases[-1].name!r} is the last and lasts until the end of the run; remove its steps"
            )
        return self

    def phase(self, step: int) -> tuple[PhaseSettings, float]:
        """Return the phase of a step, and the share of its steps already taken, in [0, 1); 0 in the last phase.

        Args:
            step: Steps already taken.
        """
        for phase in self.phases:
            if phase.steps is None or step < phase.steps:
                return phase, 0.0 if phase.steps is None else step / phase.steps
            step -= phase.steps
        raise AssertionError("the last phase has no end")

    def shares(self, steps: int) -> list[tuple[PhaseSettings, float]]:
        """Return each phase with its share of the steps of a run.

        Args:
            steps: Steps of the run.
        """
        shares, left = [], steps
        for phase in self.phases:
            taken = left if phase.steps is None else min(phase.steps, left)
            shares.append((phase, taken / steps))
            left -= taken
        return shares

    @property
    def needs_teacher(self) -> bool:
        """Whether any phase compares the student with the base."""
        return any(phase.teacher or phase.output for phase in self.phases)


def split_methods(methods: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Split the values of `--method` into methods to train and methods to attach after the training.

    Args:
        methods: Values such as "dc", "dydit", "cache", "skip=0.7" or "merge=0.3". The number is the target of the
            calibration as a share of the FLOPs, or for merge the ratio.

    Returns:
        The names of the methods to train, and for each of the others the fields of its `AfterSettings`.

    Raises:
        RecipeError: A method is unknown or listed twice, or the text after "=" is not a number.
    """
    trained, after, names = [], [], []
    for text in methods:
        name, equals, number = text.partition("=")
        name = short_name(name)
        names.append(name)
        if name in TRAINED and not equals:
            trained.append(name)
            continue
        if name not in ("cache", "skip", "merge"):
            raise RecipeError(
                f"--method {text} is unknown; choose dc or dydit, which are trained, or cache, skip=SHARE or "
                "merge=RATIO, which are attached after training."
            )
        fields: dict[str, Any] = {"method": name}
        if equals:
            try:
                fields["ratio" if name == "merge" else "flops"] = float(number)
            except ValueError as error:
                raise RecipeError(f"--method {text}: {number!r} is not a number; write {name}=0.7.") from error
        after.append(fields)
    if len(set(names)) < len(names):
        raise RecipeError(f"--method {', '.join(methods)} repeats a method; name each once.")
    return trained, after
