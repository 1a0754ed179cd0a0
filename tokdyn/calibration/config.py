"""What `tokdyn calibrate` does and how: one strict, immutable model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from tokdyn.diffusion.sampling import GuidanceScale, Steps
from tokdyn.diffusion.schedulers import SchedulerName
from tokdyn.files import UserPath

Target = Annotated[float, Field(gt=0.0, lt=1.0)]
_SKIP = ("levels", "protected", "sequential")
_CACHE = ("cache_steps", "threshold", "indicator", "degree")


def _listed(value: Any) -> Any:
    """Reads `0,-1`, as a command line gives it, and a single value, as lists."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int) else value


class CalibrateConfig(BaseModel):
    """Settings of one calibration.

    Attributes:
        model: A training folder, one of its checkpoints, a folder of `save_pretrained`, a checkpoint file, or the
            folder of a DiTPipeline of diffusers.
        method: `skip` finds blocks to skip at each noise level, `cache` when to reuse what the blocks did before.
        out: Folder to write to; None means calibrated/NAME/METHOD, after the model.
        flops: Share of the FLOPs of whole trajectories to come down to; skip needs it.
        levels: skip: rows of noise levels that the table has at most.
        protected: skip: blocks that always run, as in 0,-1; negative numbers count from the end.
        sequential: skip: choose one block after the other by the error of the output; better and much slower.
        cache_steps: cache: share of the steps whose blocks may run, instead of flops.
        threshold: cache: accumulated change below which a step is reused, where neither flops nor cache_steps is given.
        indicator: cache: compare the modulated `input` of the first block, or what the `first_block` adds.
        degree: cache: of the polynomial that is fitted.
        count: Images to draw; every one is a trajectory to measure.
        classes: Names or numbers of the classes to draw, `none` for no class; None draws all of them in turn.
        seed: Image i starts from seed + i.
        batch_size: Images per model call, before guidance doubles it.
        scheduler: `ddpm`, `ddim` or `dpm` for a noise objective, `euler` for a flow; None takes ddpm or euler, and of a
            pipeline its own.
        steps: Model calls per image.
        guidance: Scale of classifier-free guidance; 1 means none.
        ema: Use the averaged weights.
        precision: `bf16` computes matrix products in bfloat16; `auto` does so on a GPU only.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    method: Literal["skip", "cache"]
    out: UserPath | None = None
    flops: Target | None = None
    levels: PositiveInt = 10
    protected: Annotated[tuple[int, ...], BeforeValidator(_listed)] = ()
    sequential: bool = False
    cache_steps: Target | None = None
    threshold: Annotated[float, Field(gt=0.0)] = 0.1
    indicator: Literal["input", "first_block"] = "input"
    degree: PositiveInt = 4
    count: PositiveInt = 8
    classes: Annotated[tuple[int | str, ...] | None, BeforeValidator(_listed)] = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    batch_size: PositiveInt = 8
    scheduler: SchedulerName | None = None
    steps: Steps = 50
    guidance: GuidanceScale = 1.0
    ema: bool = True
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        others = _CACHE if self.method == "skip" else _SKIP
        for name in others:
            if self._changed(name):
                raise ValueError(f"{name} has no effect with method={self.method}: leave it out")
        if self.method == "skip" and self.flops is None:
            raise ValueError("method=skip needs a target: set flops, such as flops=0.7")
        targets = [name for name in ("flops", "cache_steps", "threshold") if self._changed(name)]
        if self.method == "cache" and len(targets) > 1:
            raise ValueError(f"{targets[0]} and {targets[1]} both decide the threshold: give one of them")
        return self

    def _changed(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)
