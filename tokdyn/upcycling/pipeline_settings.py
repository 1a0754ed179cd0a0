"""Define the settings of `tokdyn upcycle` for a pipeline of diffusers, which are read before torch is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from tokdyn.files import UserPath
from tokdyn.prompts import Drawing, Number, Prompts
from tokdyn.section import Section

if TYPE_CHECKING:
    from tokdyn.upcycling.pipelines import DistilSettings


class PipelineConfig(Section):
    """Settings of `tokdyn upcycle` for a pipeline of diffusers.

    Attributes:
        base: Folder or hub id of the pipeline.
        out: Output folder; null means upcycled/NAME, where NAME is that of the pipeline.
        prompts: A prompt, a .txt file with one prompt per line, or a .yaml or .json file with a list of texts and of
            arguments, such as {prompt: make it night, image: street.png}.
        target: N of the chunking, cells per kept token.
        sampling_steps: Model calls per image; null means the default of the pipeline.
        guidance: Guidance scale; null means the default of the pipeline.
        height: Height of the images in pixels; null means the default of the pipeline.
        width: Width of the images in pixels.
        steps: Optimizer steps.
        calls: Recorded calls per optimizer step.
        lr: Learning rate.
        warmup_steps: Steps over which the learning rate rises linearly.
        trained: `methods` trains only the parts of the methods; `all` also trains the transformer, with a copy of the
            original as its teacher.
        seed: Seed of images and training.
        checkpoint_every: Steps between checkpoints.
        precision: Precision of the pipeline's weights.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
    """

    base: str
    out: UserPath | None = None
    prompts: Prompts = ("a photo",)
    target: Annotated[float, Field(gt=1.0)] = 4.0
    sampling_steps: Number | None = None
    guidance: Annotated[float, Field(ge=0.0)] | None = None
    height: Number | None = None
    width: Number | None = None
    steps: PositiveInt = 1000
    calls: PositiveInt = 1
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    trained: Literal["methods", "all"] = "methods"
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    checkpoint_every: PositiveInt = 100
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError("give both height and width, or neither")
        if self.trained == "all" and self.precision == "bf16":
            raise ValueError("trained=all needs precision=fp32: small steps are lost in bf16 weights")
        return self

    @property
    def distillation(self) -> DistilSettings:
        """The settings of the training."""
        from tokdyn.upcycling.pipelines import DistilSettings

        names = set(DistilSettings.model_fields) & set(type(self).model_fields)
        return DistilSettings(**{name: getattr(self, name) for name in names})

    @property
    def drawing(self) -> Drawing:
        """What the pipeline draws."""
        names = ("prompts", "guidance", "height", "width", "seed")
        return Drawing(steps=self.sampling_steps, **{name: getattr(self, name) for name in names})
