"""Define the settings of `tokdyn upcycle` for a pipeline of diffusers, which are read before torch is loaded."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from tokdyn.files import UserPath
from tokdyn.prompts import Drawing, Number, Prompts
from tokdyn.upcycling.distil_settings import DistilSettings

TAIL_DROPS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
"""The tail drops that DC-DiT is trained with (arXiv 2603.06351)."""


class PipelineConfig(DistilSettings):
    """Settings of `tokdyn upcycle` for a pipeline of diffusers, beside those of `DistilSettings`.

    Attributes:
        base: Folder or hub id of the pipeline; its weights may be quantised, unless trained=all.
        out: Output folder; null means upcycled/NAME, where NAME is that of the pipeline.
        prompts: A prompt, a .txt file with one prompt per line, or a .yaml or .json file with a list of texts and of
            arguments, such as {prompt: make it night, image: street.png}.
        target: N of the chunking, cells per kept token.
        sampling_steps: Model calls per image; null means the default of the pipeline.
        guidance: Guidance scale; null means the default of the pipeline.
        height: Height of the images in pixels; null means the default of the pipeline.
        width: Width of the images in pixels.
        frames: Frames of a video; null means the default of the pipeline.
        steps_per_image: Steps that train on the calls of an image before the next one is drawn; null draws an image for
            every prompt before the first step, and keeps the calls of all.
        tail_drops: Tail drops (shares of the kept tokens to drop) of which every call draws one, so that one model
            works at all these budgets; null means 0 to 0.6 in steps of 0.1, with --method dc.
        seed: Seed of images and training.
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
    frames: Number | None = None
    steps_per_image: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"

    @model_validator(mode="after")
    def _settings_fit(self) -> Self:
        if (self.height is None) != (self.width is None):
            raise ValueError("give both height and width, or neither")
        if self.trained == "all" and self.precision == "bf16":
            raise ValueError("trained=all needs precision=fp32: small steps are lost in bf16 weights")
        return self

    def distillation(self, chunking: bool) -> DistilSettings:
        """Return the settings of the training.

        Args:
            chunking: Whether Chunking is among the methods, whose tokens can be dropped.
        """
        settings = {name: getattr(self, name) for name in DistilSettings.model_fields}
        drops = TAIL_DROPS if chunking and self.tail_drops is None else self.tail_drops
        return DistilSettings(**{**settings, "tail_drops": drops})

    @property
    def drawing(self) -> Drawing:
        """What the pipeline draws."""
        names = ("prompts", "guidance", "height", "width", "frames", "seed")
        return Drawing(steps=self.sampling_steps, **{name: getattr(self, name) for name in names})
