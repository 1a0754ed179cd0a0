"""Settings of `tokdyn sample`: one strict, immutable model."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from tokdyn.diffusion.guidance import GuidanceChannels
from tokdyn.diffusion.sampling import Drop, GuidanceScale, Interval, Points, Sampler, Share, Steps
from tokdyn.diffusion.schedulers import SchedulerName
from tokdyn.files import UserPath


def listed(value: Any) -> Any:
    """Split `0,0.3`, as it is typed on a command line, into a list, and wrap a single number into one."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else value


def _two_levels(value: Any) -> Any:
    """Split `0.2,0.8` into two noise levels."""
    values = listed(value)
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise ValueError(f"expected two noise levels LOW,HIGH, got {value}")
    return values


def _distinct_budgets(drops: tuple[float, ...]) -> tuple[float, ...]:
    """Reject budgets that would share a folder, whose name has six digits."""
    if not drops:
        raise ValueError("tail_drop is empty: tail_drop=0 drops nothing")
    names = [f"{drop:g}" for drop in drops]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"the budget {repeated[0]} is listed twice")
    return drops


class SampleConfig(BaseModel):
    """Settings of one sampling job.

    Attributes:
        model: A training folder, one of its checkpoints, a folder of `save_pretrained`, or a checkpoint file.
        out: Folder to write to; None takes samples/NAME, after the model.
        format: One PNG `grid`, a `folder` of PNGs (resumed where it stopped), or an `npz` with `arr_0` uint8
            (N, H, W, 3) and `arr_1` labels (N,).
        count: Number of images; classes are assigned in turn.
        classes: Names or numbers of the classes to sample, `none` for no class; None takes all of them.
        seed: Image i starts from seed + i, whatever the batch size and the budget.
        batch_size: Images per model call, before guidance doubles it.
        scheduler: `ddpm`, `ddim` or `dpm` for a noise objective, `euler` for a flow; None takes ddpm or euler.
        steps: Model calls per image.
        guidance: Scale of classifier-free guidance; 1 means none.
        guidance_channels: Guide `all` channels, or the first `three` as the public DiT and DC-DiT code does.
        guidance_interval: Noise levels LOW,HIGH between which guidance acts; 1 is pure noise.
        tail_drop: Fraction of the kept tokens to drop; several make the same images at several budgets.
        drop_curve: Points [[LEVEL, FRACTION], ...] with rising noise levels, in place of tail_drop; the fraction runs
            from one to the next in straight lines, and level 1 is pure noise.
        uncond_tail_drop: The same for the unconditional branch (Lite-CFG), a number or points; None takes tail_drop.
        clip: Clamp predicted images to [-1, 1] at each step; None does so for pixels and not for latents.
        methods: Folder with methods that act while sampling, from `tokdyn calibrate`, `tokdyn upcycle` or
            `tokdyn.save`, in place of those that the model was trained with.
        vae: Autoencoder that decodes latents, a path or a hub id; None takes the one that encoded the training data.
        maps: Also draw which tokens were kept over the trajectory, and kept tokens and time against noise level.
        map_images: Number of images in that picture.
        map_steps: Number of steps in that picture.
        class_folders: Put the images of format=folder into one folder per class, from which evaluation reads labels.
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
    tail_drop: Annotated[tuple[Share, ...], AfterValidator(_distinct_budgets), BeforeValidator(listed)] = (0.0,)
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
        return bool(getattr(self, name) != type(self).model_fields[name].default)

    def sampler(self, tail_drop: float, clip: bool) -> Sampler:
        """Return the sampler of one budget."""
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
