"""The settings of `tokdyn playground`, checked by pydantic; unknown keys are refused. They load no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from tokdyn.diffusion.settings import GuidanceScale, SchedulerName, Share
from tokdyn.errors import RecipeError
from tokdyn.playground.words import read_methods
from tokdyn.prompts import Drawing
from tokdyn.section import Section

Steps = Annotated[int, Field(ge=1, le=1000)]
Seed = Annotated[int, Field(ge=0, lt=2**62)]


class _Served(Section):
    """Where the page is, and what it begins with.

    Attributes:
        host: Address that the page answers at. The default is seen from this machine alone; with another one, such as
            0.0.0.0, anybody on the network can draw.
        port: Port of the page.
        methods: Methods that the page begins with: a list such as [{method: TokenMerge, ratio: 0.3}], a folder or a
            preset file of `tokdyn calibrate`, or for a pipeline a preset such as fast.
        shown: Steps that are shown while a picture is drawn, spread evenly. Showing one does not count as time of the
            picture, but takes some: that of a call of the autoencoder if the model generates latents.
    """

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)] = 7860
    methods: str = ""
    shown: PositiveInt = 25

    @model_validator(mode="after")
    def _methods_can_be_read(self) -> Self:
        try:
            read_methods(self.methods)
        except RecipeError as error:
            raise ValueError(str(error)) from error
        return self


class PlaygroundConfig(_Served):
    """Settings of the playground of a class-conditional model.

    Attributes:
        model: A training folder, one of its checkpoints, a folder of `save_pretrained`, a checkpoint file, or a name
            that `tokdyn models` lists as pretrained.
        seed: Seed that the page begins with.
        steps: Sampling steps that the page begins with.
        guidance: Scale of classifier-free guidance that the page begins with; 1 turns it off.
        tail_drop: Share of the kept tokens to drop that the page begins with, for models with dynamic chunking.
        scheduler: `ddpm`, `ddim` or `dpm` for a noise objective, `euler` for a flow; None takes ddim or euler.
        vae: Autoencoder that decodes latents, a path or a hub id; None takes the one that encoded the training data.
        ema: Use the averaged weights.
        precision: `bf16` computes matrix products in bfloat16; `auto` does so on a GPU only.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
    """

    model: str
    seed: Seed = 0
    steps: Steps = 25
    guidance: GuidanceScale = 2.0
    tail_drop: Share = 0.0
    scheduler: SchedulerName | None = None
    vae: str | None = None
    ema: bool = True
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"


class PipelinePlaygroundConfig(_Served, Drawing):
    """Settings of the playground of a pipeline of diffusers. Null means the default of the pipeline.

    Attributes:
        model: Folder or hub id of the pipeline.
        prompts: The prompt that the page begins with, or a .txt file with one in each line, to choose from.
        steps: Sampling steps that the page begins with.
        guidance: Guidance scale that the page begins with.
        seed: Seed that the page begins with.
        precision: Precision of the pipeline's weights.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
    """

    model: str
    steps: Steps | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"

    @model_validator(mode="after")
    def _prompts_are_texts(self) -> Self:
        if not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError("the playground draws texts, not dictionaries of arguments: write a .txt file of prompts")
        return self


class Wanted(Section):
    """What the page asks for.

    Attributes:
        subject: name of the class, or the prompt.
        seed: of the noise.
        steps: sampling steps.
        guidance: scale of classifier-free guidance; 1 turns it off.
        tail_drop: share of the kept tokens to drop.
        uncond_tail_drop: the same for the unconditional branch (Lite-CFG); None takes `tail_drop`.
        methods: text that `read_methods` reads; "" attaches none.
    """

    subject: str
    seed: Seed = 0
    steps: Steps = 25
    guidance: GuidanceScale = 1.0
    tail_drop: Share = 0.0
    uncond_tail_drop: Share | None = None
    methods: str = ""

    @property
    def reduces(self) -> bool:
        """Whether the picture computes less than the one beside it."""
        lite = self.guidance != 1.0 and self.uncond_tail_drop is not None and self.uncond_tail_drop > 0.0
        return bool(self.methods.strip() or self.tail_drop or lite)

    @property
    def at_full_cost(self) -> Wanted:
        """The same picture without added methods and without tail drops."""
        return self.model_copy(update={"methods": "", "tail_drop": 0.0, "uncond_tail_drop": None})
