"""The settings of `tokdyn sample`, checked by pydantic; unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from tokdyn.diffusion.settings import (
    Drop,
    GuidanceChannels,
    GuidanceScale,
    Interval,
    Points,
    Sampler,
    SchedulerName,
    Share,
    Steps,
)
from tokdyn.files import UserPath
from tokdyn.prompts import Drawing
from tokdyn.section import listed


def _two_levels(value: Any) -> Any:
    """Split a string such as "0.2,0.8" into two noise levels."""
    values = listed(value)
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise ValueError(f"expected two noise levels LOW,HIGH, got {value}")
    return values


def _distinct_drops(drops: tuple[float, ...]) -> tuple[float, ...]:
    """Reject tail drops that are equal to six digits, because the names of their folders hold no more digits."""
    if not drops:
        raise ValueError("tail_drop is empty: give at least one share; tail_drop=0 drops nothing")
    names = [f"{drop:g}" for drop in drops]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"the tail drop {repeated[0]} is listed twice, to six digits: remove one of the two")
    return drops


class SampleConfig(BaseModel):
    """Settings of one sampling job.

    Attributes:
        model: A training folder, one of its checkpoints, a folder of `save_pretrained`, or a checkpoint file.
        out: Folder to write to; None takes samples/NAME, where NAME is the model's.
        format: One PNG `grid`; a `folder` with a PNG per image, which can be resumed; or an `npz` with `arr_0` uint8
            (N, H, W, 3) and `arr_1`, the labels (N,).
        count: Number of images; the classes are assigned to them in turn.
        classes: Names or numbers of the classes to sample; `none` is unconditional. None takes all classes.
        seed: The noise of image i has the seed `seed` + i, whatever the batch size and the tail drop.
        batch_size: Images per model call, before guidance doubles it.
        scheduler: `ddpm`, `ddim` or `dpm` for a noise objective, `euler` for a flow; None takes ddpm or euler.
        steps: Sampling steps per image.
        guidance: Scale of classifier-free guidance; 1 turns it off.
        guidance_channels: Guide `all` channels, or the first `three` as the public DiT and DC-DiT code does.
        guidance_interval: Noise levels LOW,HIGH between which guidance acts; level 1 is pure noise.
        tail_drop: Share of the kept tokens to drop. With several, the same images are sampled with each.
        drop_curve: Points [[LEVEL, SHARE], ...] with ascending noise levels, in place of tail_drop; the share is
            interpolated linearly between them. Level 1 is pure noise.
        uncond_tail_drop: Tail drop of the unconditional branch (Lite-CFG): a share or points. None takes that of the
            conditional branch.
        clip: Clamp predicted images to [-1, 1] at each step; None does so for pixels and not for latents.
        methods: Folder or file with methods to attach, from `tokdyn calibrate`, `tokdyn upcycle` or `tokdyn.save`, or a
            preset file of `tokdyn calibrate`, in place of those that the model was trained with.
        vae: Autoencoder that decodes latents, a path or a hub id; None takes the one that encoded the training data.
        maps: Also draw which tokens were kept along the trajectory (maps.png), and the kept tokens and the time against
            the noise level (trajectory.png).
        map_images: Number of images in maps.png.
        map_steps: Number of steps in maps.png.
        class_folders: With format=folder, write the images of each class into a subfolder, from which evaluation reads
            the labels.
        columns: Images per row of the grid; None makes it about square.
        ema: Use the averaged weights.
        precision: `bf16` computes matrix products in bfloat16; `auto` does so on a GPU only.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    out: UserPath | None = None
    format: Literal["grid", "folder", "npz"] = "grid"
    count: Annotated[int, Field(ge=1, le=10_000_000)] = 16
    classes: Annotated[tuple[int | str, ...] | None, BeforeValidator(listed)] = None
    seed: Annotated[int, Field(ge=0, lt=2**62)] = 0
    batch_size: PositiveInt = 64
    scheduler: SchedulerName | None = None
    steps: Steps = 250
    guidance: GuidanceScale = 1.0
    guidance_channels: GuidanceChannels = "all"
    guidance_interval: Annotated[Interval, BeforeValidator(_two_levels)] = (0.0, 1.0)
    tail_drop: Annotated[tuple[Share, ...], AfterValidator(_distinct_drops), BeforeValidator(listed)] = (0.0,)
    drop_curve: Points | None = None
    uncond_tail_drop: Drop | None = None
    clip: bool | None = None
    methods: UserPath | None = None
    vae: str | None = None
    maps: bool = False
    map_images: PositiveInt = 4
    map_steps: PositiveInt = 6
    class_folders: bool = False
    columns: PositiveInt | None = None
    ema: bool = True
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: str = "auto"

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Self:
        for name in ("uncond_tail_drop", "guidance_channels", "guidance_interval"):
            if self.guidance == 1.0 and self._changed(name):
                raise ValueError(f"{name} has no effect without guidance: set guidance, such as guidance=1.5")
        for name in ("map_images", "map_steps"):
            if not self.maps and self._changed(name):
                raise ValueError(f"{name} has no effect without maps: set maps=true")
        if self.drop_curve is not None and self._changed("tail_drop"):
            raise ValueError("drop_curve takes the place of tail_drop: give one of the two")
        if self.class_folders and self.format != "folder":
            raise ValueError(f"class_folders is for format=folder, not for format={self.format}")
        if self.columns is not None and self.format != "grid":
            raise ValueError(f"columns is for format=grid, not for format={self.format}")
        return self

    def _changed(self, name: str) -> bool:
        """Return whether a setting differs from its default."""
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def sampler(self, tail_drop: float, clip: bool) -> Sampler:
        """Return the sampler of these settings.

        Args:
            tail_drop: One of the shares in `tail_drop`; ignored if there is a drop_curve.
            clip: Whether to clamp predicted images.
        """
        return Sampler(
            scheduler=self.scheduler,
            steps=self.steps,
            guidance=self.guidance,
            guidance_channels=self.guidance_channels,
            guidance_interval=self.guidance_interval,
            tail_drop=tail_drop if self.drop_curve is None else self.drop_curve,
            uncond_tail_drop=self.uncond_tail_drop,
            clip=clip,
        )


class PipelineSampleConfig(Drawing):
    """Settings of `tokdyn sample` for a pipeline of diffusers, beside those of `Drawing`.

    Attributes:
        model: Folder or hub id of the pipeline.
        out: Folder to write to; null means samples/NAME. A repeated command draws only what is missing there.
        methods: Folder or file with methods to attach, from `tokdyn calibrate`, `tokdyn upcycle` or `tokdyn.save`, or a
            preset file of `tokdyn calibrate`.
        tail_drop: Share of the kept tokens that Chunking drops; null leaves it as the methods say.
        precision: Precision of the pipeline's weights.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
    """

    model: str
    out: UserPath | None = None
    methods: UserPath | None = None
    tail_drop: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"

    @model_validator(mode="after")
    def _tail_drop_has_an_effect(self) -> Self:
        if self.tail_drop is not None and self.methods is None:
            raise ValueError("tail_drop has no effect without methods, since all tokens are kept; add methods=FOLDER")
        return self
