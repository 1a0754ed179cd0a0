"""Define the settings of `tokdyn bench flops`, `bench speed` and `bench quality`, also for pipelines of diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from tokdyn.diffusion.settings import GuidanceScale, SchedulerName, Share, Steps
from tokdyn.files import UserPath
from tokdyn.prompts import Drawing
from tokdyn.section import listed

Precision = Literal["fp32", "bf16"]
Mode = Literal["sample", "train"]


class FlopsConfig(BaseModel):
    """Settings of `tokdyn bench flops`.

    Attributes:
        models: Named models such as DiT-XL/2 or DC-DiT-S, or models that `tokdyn sample` accepts; null takes all named
            models.
        steps: Sampling steps per image.
        guidance: Scale of classifier-free guidance; any value but 1 also computes the unconditional branch.
        sample_size: Input size of named models, rows and columns; 32 is a 256-pixel image in an 8x latent space.
        in_channels: Number of input channels of named models.
        num_classes: Number of classes of named models.
        target: N of named DC-DiTs, cells per kept token.
        kept: Kept share of DC-DiTs before tail drop. With null, it is 1/N for named models, which have no trained
            weights, and is measured for checkpoints on images that they draw.
        tail_drop: Share of the kept tokens to drop.
        uncond_tail_drop: Tail drop of the unconditional branch (Lite-CFG); null takes tail_drop.
        images: Number of images to draw with each checkpoint to measure its kept share, if `kept` is null.
        scheduler: Scheduler to draw these images with; null takes ddpm, or euler for a flow.
        seed: Seed of the first of these images.
        count: Also count the FLOPs of some calls with torch's counter, and fail if the computed FLOPs of these calls
            differ from the count by more than 0.1%.
        csv: Write the table to this CSV file.
        plot: Draw the FLOPs by part to this PNG.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    models: Annotated[tuple[str, ...] | None, BeforeValidator(listed)] = None
    steps: Steps = 250
    guidance: GuidanceScale = 1.0
    sample_size: PositiveInt = 32
    in_channels: PositiveInt = 4
    num_classes: PositiveInt = 1000
    target: Annotated[float, Field(gt=1.0)] = 4.0
    kept: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    tail_drop: Share = 0.0
    uncond_tail_drop: Share | None = None
    images: PositiveInt = 4
    scheduler: SchedulerName | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    count: bool = True
    csv: UserPath | None = None
    plot: UserPath | None = None


class SpeedConfig(BaseModel):
    """Settings of `tokdyn bench speed`.

    Attributes:
        model: Model of the stacks that do not name their own: a named model such as DC-DiT-S (random weights), or a
            model in any form that `tokdyn sample` accepts.
        batch: Images per call; one number or several.
        size: Rows and columns of the input; one number or several. null takes the model's own size, or 32 for a named
            model.
        kept: Kept share of DC-DiTs, the same in every image; one number or several. null leaves it to the router.
        precision: `fp32`, `bf16` (autocast for matrix products), or both.
        mode: `sample` (a call without gradients), `train` (forward and backward), or both.
        compile: `none`, or the parts of the model to compile: `scaffold`, `blocks` or `all`; one or several.
            Compilation happens in the warm-up and is not timed.
        rounds: Number of timed rounds. In each, every stack runs once in turn; the median counts.
        warmup: Number of rounds before that, which are not timed.
        memory: Also measure the peak memory that a call adds.
        plot: Draw the times to this PNG; needs several sizes or batches.
        out: Write all results to this JSON file.
        threads: Number of CPU threads; null takes all.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    batch: Annotated[tuple[PositiveInt, ...], BeforeValidator(listed), Field(min_length=1)] = (8,)
    size: Annotated[tuple[PositiveInt, ...] | None, BeforeValidator(listed)] = None
    kept: Annotated[tuple[Annotated[float, Field(gt=0.0, le=1.0)], ...] | None, BeforeValidator(listed)] = None
    precision: Annotated[tuple[Precision, ...], BeforeValidator(listed), Field(min_length=1)] = ("fp32",)
    mode: Annotated[tuple[Mode, ...], BeforeValidator(listed), Field(min_length=1)] = ("sample",)
    compile: Annotated[
        tuple[Literal["none", "scaffold", "blocks", "all"], ...], BeforeValidator(listed), Field(min_length=1)
    ] = ("none",)
    rounds: Annotated[int, Field(ge=3)] = 7
    warmup: Annotated[int, Field(ge=1)] = 2
    memory: bool = False
    plot: UserPath | None = None
    out: UserPath | None = None
    threads: PositiveInt | None = None
    device: str = "auto"


class QualityConfig(BaseModel):
    """Settings of `tokdyn bench quality`.

    Attributes:
        model: Model of the stacks that do not name their own, in any form that `tokdyn sample` accepts.
        out: Folder to write to. A repeated run continues there: images that exist are not sampled again, and images
            that were made with other settings are refused.
        count: Images per stack; image i has the seed `seed` + i in every stack.
        seed: Seed of the first image.
        batch_size: Images per model call, before guidance doubles it.
        scheduler: `ddpm`, `ddim` or `dpm` for a noise objective, `euler` for a flow; null takes ddpm or euler.
        steps: Sampling steps per image.
        guidance: Scale of classifier-free guidance; 1 turns it off.
        held_out: Images (folder or zip) or latents that none of the models was trained on, to measure the diffusion
            loss on; null does not measure it.
        held_out_count: Number of held-out images.
        reference: Images or statistics to compare generated images with, as for `tokdyn eval`.
        extractor: Network whose features are compared, as for `tokdyn eval`; null measures no feature distances.
        rounds: Number of timed rounds. In each, every stack draws one batch in turn; the median counts. 0 measures no
            time.
        timed: Images in a timed batch.
        precision: `bf16` computes matrix products in bfloat16; `auto` does so on a GPU only.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
        ema: Use the averaged weights.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = None
    out: UserPath = Path("quality")
    count: Annotated[int, Field(ge=2)] = 1000
    seed: Annotated[int, Field(ge=0)] = 0
    batch_size: PositiveInt = 64
    scheduler: SchedulerName | None = None
    steps: Steps = 50
    guidance: GuidanceScale = 1.0
    held_out: UserPath | None = None
    held_out_count: Annotated[int, Field(ge=2)] = 2000
    reference: UserPath | None = None
    extractor: str | None = None
    rounds: Annotated[int, Field(ge=0)] = 3
    timed: PositiveInt = 16
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"
    ema: bool = True

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        if self.reference is not None and self.extractor is None:
            raise ValueError("reference has no effect without extractor: name the network whose features are compared")
        return self


class PipelineBenchConfig(Drawing):
    """Settings of `tokdyn bench speed` and `bench quality` for a pipeline, beside those of `Drawing`.

    Attributes:
        model: Folder or hub id of the pipeline.
        out: For quality: folder to write to.
        prompts: A prompt, a .txt file with one prompt per line, or a .yaml or .json file with a list of texts and of
            arguments, such as {prompt: make it night, image: street.png}. For speed the first one counts.
        rounds: For speed: how often the prompt is drawn without methods and with them, in turn; the median counts.
        precision: Precision of the pipeline's weights.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
    """

    model: str
    out: UserPath = Path("quality")
    rounds: PositiveInt = 3
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
