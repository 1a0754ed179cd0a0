"""Settings of `tokdyn calibrate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from tokdyn.diffusion.settings import GuidanceScale, SchedulerName, Steps
from tokdyn.files import UserPath
from tokdyn.method_names import short_name
from tokdyn.prompts import Number, Prompts
from tokdyn.section import listed

Target = Annotated[float, Field(gt=0.0, lt=1.0)]
_SKIP_SETTINGS = ("levels", "protected", "sequential")
_CACHE_SETTINGS = ("indicator", "degree")
_MAG_SETTINGS = ("start", "max_reused")
_OF_RULES = ("cache_steps", "threshold")
_THRESHOLDS = {"cache": 0.1, "mag": 0.06}


def _method(value: Any) -> Any:
    """Return the short name of the method, or rule of FeatureCache, with this name; other values unchanged."""
    return "mag" if value == "magcache" else short_name(value)


class CalibrateConfig(BaseModel):
    """Settings of one calibration.

    Attributes:
        model: A training folder, one of its checkpoints, a folder of `save_pretrained`, a checkpoint file, or the
            folder or hub id of a pipeline of diffusers.
        method: `skip` finds the blocks to skip at each noise level, `cache` the steps at which to reuse the output of
            the blocks by a polynomial (TeaCache), `mag` by the lengths of their effect from step to step (MagCache).
        out: Output folder; null means calibrated/NAME/METHOD, where NAME is that of the model.
        flops: Target, as a share of the FLOPs of whole trajectories; skip needs it.
        levels: skip: largest number of noise-level rows in the table.
        protected: skip: blocks that always run, such as 0,-1; negative numbers count from the end.
        sequential: skip: choose blocks one by one by the error of the output; better and much slower.
        cache_steps: cache, mag: target, as the share of computed steps, instead of flops.
        threshold: cache, mag: accumulated change below which a step is reused, if neither flops nor cache_steps is
            given; null means 0.1, and 0.06 for mag.
        indicator: cache: compare the modulated `input` of the first block, what the `first_block` adds, the embedding
            of the timestep (`time`), or its projection to the modulation of the blocks (`projected_time`).
        degree: cache: degree of the fitted polynomial.
        start: mag: share of the steps that are computed first.
        max_reused: mag: most steps in a row that are reused; null does not limit them.
        count: Images to draw, each of which is one trajectory to measure.
        prompts: Of a pipeline: a prompt, a .txt file with one prompt per line, or a .yaml or .json file with a list of
            texts and of arguments, such as {prompt: make it night, image: street.png}; images cycle through them.
        height: Height of the images of a pipeline in pixels; null means its default.
        width: Width of the images of a pipeline in pixels.
        frames: Frames of the videos of a pipeline; null means its default.
        classes: Names or numbers of the classes to draw, `none` for no class; null cycles through all of them.
        seed: Image i starts from seed + i.
        batch_size: Images per model call, before guidance doubles it.
        scheduler: `ddpm`, `ddim` or `dpm` for a noise objective, `euler` for a flow; null means ddpm or euler, or the
            scheduler of a pipeline.
        steps: Model calls per image; a pipeline has a default of its own.
        guidance: Scale of classifier-free guidance; 1 means none; a pipeline has a default of its own.
        ema: Use the averaged weights.
        precision: `bf16` computes matrix products in bfloat16; `auto` does so on a GPU only.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    method: Annotated[Literal["skip", "cache", "mag"], BeforeValidator(_method)]
    out: UserPath | None = None
    flops: Target | None = None
    levels: PositiveInt = 10
    protected: Annotated[tuple[int, ...], BeforeValidator(listed)] = ()
    sequential: bool = False
    cache_steps: Target | None = None
    threshold: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    indicator: Literal["input", "first_block", "time", "projected_time"] = "input"
    degree: PositiveInt = 4
    start: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    max_reused: PositiveInt | None = 3
    count: PositiveInt = 8
    prompts: Prompts | None = None
    height: Number | None = None
    width: Number | None = None
    frames: Number | None = None
    classes: Annotated[tuple[int | str, ...] | None, BeforeValidator(listed)] = None
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
        own = {"skip": _SKIP_SETTINGS, "cache": _CACHE_SETTINGS + _OF_RULES, "mag": _MAG_SETTINGS + _OF_RULES}
        others = dict.fromkeys(name for names in own.values() for name in names)
        for name in (name for name in others if name not in own[self.method]):
            if self._changed(name):
                raise ValueError(f"{name} has no effect with method={self.method}: leave it out")
        if self.method == "skip" and self.flops is None:
            raise ValueError("method=skip needs a target: set flops, such as flops=0.7")
        targets = [name for name in ("flops", "cache_steps", "threshold") if self._changed(name)]
        if self.method != "skip" and len(targets) > 1:
            raise ValueError(f"{targets[0]} and {targets[1]} both decide the threshold: give one of them")
        return self

    @property
    def given_threshold(self) -> float:
        """The threshold of a cache, if no target decides it."""
        return _THRESHOLDS.get(self.method, 0.1) if self.threshold is None else self.threshold

    def _changed(self, name: str) -> bool:
        return bool(getattr(self, name) != type(self).model_fields[name].default)
