"""Settings of `tokdyn tune`: the knobs of a schedule, the FLOPs target and the search."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

from tokdyn.diffusion.sampling import GuidanceScale, Steps
from tokdyn.diffusion.schedulers import SchedulerName
from tokdyn.files import UserPath
from tokdyn.methods.registry import short_name
from tokdyn.sample.config import listed

Knob = Annotated[Literal["drop", "uncond", "merge", "skip", "cache"], BeforeValidator(short_name)]
KNOBS: tuple[Knob, ...] = ("drop", "uncond", "merge", "skip", "cache")


class TuneConfig(BaseModel):
    """Settings of `tokdyn tune`.

    Attributes:
        model: Anything `tokdyn sample` accepts.
        flops: Target, as a share of the FLOPs of the same images drawn by the unmodified model.
        out: Output folder.
        knobs: What the search may turn: `drop` (tail drop of a chunking model by noise level), `uncond` (the same for
            the unconditional branch), `merge` (TokenMerge by noise level), `skip` (a calibrated table of skipped
            blocks), `cache` (a calibrated threshold); null means all that the model has.
        trials: Schedules that the search tries.
        images: Images that each trial draws; its error is their distance to those of the unmodified model from the
            same seeds.
        finalists: Best schedules that are then measured on `count` images from other seeds, beside the uniform one.
        count: Images per finalist.
        seed: Seed of the search, and of the first image of a trial.
        batch_size: Images per model call, before guidance doubles it.
        scheduler: `ddpm`, `ddim` or `dpm` for a noise objective, `euler` for a flow; null means ddpm or euler.
        steps: Model calls per image.
        guidance: Scale of classifier-free guidance; 1 means none.
        held_out: See `tokdyn bench quality`.
        reference: See `tokdyn bench quality`.
        extractor: See `tokdyn bench quality`.
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
