"""Define the settings of `tokdyn tune`: the FLOPs target, the knobs and the search.

A knob is one way to save FLOPs; a schedule says how strongly each knob acts at each noise level.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

from tokdyn.diffusion.settings import GuidanceScale, SchedulerName, Steps
from tokdyn.files import UserPath
from tokdyn.method_names import short_name
from tokdyn.prompts import Drawing
from tokdyn.section import listed

Knob = Annotated[Literal["drop", "uncond", "merge", "skip", "cache"], BeforeValidator(short_name)]
PipelineKnob = Annotated[Literal["merge", "skip", "cache"], BeforeValidator(short_name)]
KNOBS: tuple[Knob, ...] = ("drop", "uncond", "merge", "skip", "cache")


class TuneConfig(BaseModel):
    """Settings of `tokdyn tune`.

    Attributes:
        model: The model, in any form that `tokdyn sample` accepts.
        flops: Target, as a share of the unmodified model's FLOPs for the same images.
        out: Folder to write to.
        knobs: Ways to save FLOPs that the search may use: `drop` (tail drop of a chunking model by noise level),
            `uncond` (tail drop of its unconditional branch by noise level), `merge` (TokenMerge by noise level), `skip`
            (DepthSkip with a calibrated table), `cache` (FeatureCache with a calibrated threshold); null takes all that
            the model can use.
        trials: Number of schedules that the search tries.
        images: Images that each trial draws. The error of a schedule is their distance to the unmodified model's images
            from the same seeds.
        finalists: Number of schedules, those with the lowest errors, that are then compared on `count` images from
            other seeds, together with the uniform schedule, whose settings are the same at all noise levels.
        count: Images per compared schedule.
        seed: Seed of the search, and of the first image of a trial.
        batch_size: Images per model call, before guidance doubles it.
        scheduler: `ddpm`, `ddim` or `dpm` for a noise objective, `euler` for a flow; null takes ddpm or euler.
        steps: Sampling steps per image.
        guidance: Scale of classifier-free guidance; 1 turns it off.
        held_out: Images or latents to measure the held-out loss on, as for `tokdyn bench quality`.
        reference: Images or statistics to compare generated images with, as for `tokdyn bench quality`.
        extractor: Network whose features are compared, as for `tokdyn bench quality`.
        precision: `bf16` computes matrix products in bfloat16; `auto` does so on a GPU only.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
        ema: Use the averaged weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    flops: Annotated[float, Field(gt=0.0, lt=1.0)]
    out: UserPath = Path("tuned")
    knobs: Annotated[tuple[Knob, ...] | None, BeforeValidator(listed), Field(min_length=1)] = None
    trials: PositiveInt = 48
    images: Annotated[int, Field(ge=2)] = 16
    finalists: PositiveInt = 3
    count: Annotated[int, Field(ge=2)] = 256
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: PositiveInt = 64
    scheduler: SchedulerName | None = None
    steps: Steps = 50
    guidance: GuidanceScale = 1.0
    held_out: UserPath | None = None
    reference: UserPath | None = None
    extractor: str | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    ema: bool = True


class PipelineTuneConfig(Drawing):
    """Settings of `tokdyn tune` for a pipeline, beside those of `Drawing`.

    Attributes:
        model: Folder or hub id of the pipeline.
        flops: Target, as a share of the FLOPs of the blocks without methods.
        out: Folder to write to.
        knobs: Ways to save FLOPs that the search may use: `merge` (TokenMerge by noise level), `skip` (DepthSkip with a
            calibrated table), `cache` (FeatureCache with a calibrated threshold); null takes all that the transformer
            can use. Of several transformers, each is calibrated on the calls that it gets, and turned by itself.
        prompts: A prompt, a .txt file with one prompt per line, or a .yaml or .json file with a list of texts and of
            arguments, such as {prompt: make it night, image: street.png}. Every trial draws all of them.
        trials: Number of schedules that the search tries.
        finalists: Number of schedules, those with the lowest errors, that are compared on the same prompts with other
            noise, together with the uniform schedule, whose settings are the same at all noise levels.
        seed: Seed of the search; the noise of prompt i has the seed `seed` + i.
        precision: Precision of the pipeline's weights.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
    """

    model: str
    flops: Annotated[float, Field(gt=0.0, lt=1.0)]
    out: UserPath = Path("tuned")
    knobs: Annotated[tuple[PipelineKnob, ...] | None, BeforeValidator(listed), Field(min_length=1)] = None
    trials: PositiveInt = 24
    finalists: PositiveInt = 3
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
