"""What `tokdyn tune` searches, for which target, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt

from tokdyn.diffusion.sampling import GuidanceScale, Steps
from tokdyn.diffusion.schedulers import SchedulerName
from tokdyn.files import UserPath
from tokdyn.sample.config import listed

Knob = Literal["drop", "uncond", "merge", "skip", "cache"]
KNOBS: tuple[Knob, ...] = ("drop", "uncond", "merge", "skip", "cache")


class TuneConfig(BaseModel):
    """Settings of `tokdyn tune`.

    Attributes:
        model: What `tokdyn sample` takes.
        flops: Share of the FLOPs of the same images without any of it, to come down to.
        out: Folder to write to.
        knobs: What may be turned: `drop` (tail drop of a chunking model by noise level), `uncond` (the same of the
            unconditional branch), `merge` (TokenMerge by noise level), `skip` (a calibrated table of blocks), `cache`
            (a calibrated threshold); null takes all that fit the model.
        trials: Schedules that the search tries with the proxy.
        images: Images of the proxy: how far they are from those of the model as it is, from the same seeds.
        finalists: Schedules that are measured on `count` images of other seeds, beside the uniform one.
        count: See `finalists`.
        seed: Of the search, and of the first image of the proxy.
        batch_size: Images per model call, before guidance doubles it.
        scheduler: `ddpm`, `ddim` or `dpm` for a noise objective, `euler` for a flow; null takes ddpm or euler.
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
