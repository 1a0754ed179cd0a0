"""Settings of `tokdyn features`. They load no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, PositiveInt

from tokdyn.data.config import DataConfig, Size


class FeaturesConfig(BaseModel):
    """Settings of `tokdyn features`.

    Attributes:
        path: folder or zip of images; required for kind=images.
        vae: folder or hub id of a diffusers autoencoder.
        out: folder for the latents. The same command continues after an interruption.
        subfolder: folder of the autoencoder below `vae`; None looks in `vae` itself, then in its folder "vae".
        kind: "images", or "shapes" (procedural images).
        size: image size in pixels, one number or (rows, columns), also written "256x384".
        channels: channels of the images.
        num_classes: expected number of classes; 1 puts all images into one class.
        on_error: "raise" stops at an unreadable image; "skip" leaves it out.
        length: number of procedural shapes.
        seed: seed of procedural shapes and of posterior samples.
        posterior: store the "mean" of the posterior, or one "sample" of it.
        flip: store the latents of the mirrored images as well, so that training can mirror samples.
        dtype: dtype of the stored latents: fp32, fp16 or bf16.
        scaling_factor: scaling factor to use in place of the autoencoder's own.
        shift_factor: shift to use in place of the autoencoder's own.
        batch_size: images per call of the autoencoder.
        shard_size: images per file.
        workers: number of processes that decode images; 0 decodes in the main process.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
        vae_dtype: dtype that the autoencoder computes in: fp32, fp16 or bf16.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str | None = None
    vae: str | None = None
    out: str
    subfolder: str | None = None
    kind: Literal["images", "shapes"] = "images"
    size: Size = 256
    channels: Literal[1, 3, 4] = 3
    num_classes: PositiveInt | None = None
    on_error: Literal["raise", "skip"] = "raise"
    length: PositiveInt = 50_000
    seed: int = 0
    posterior: Literal["mean", "sample"] = "sample"
    flip: bool = False
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    scaling_factor: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    shift_factor: FiniteFloat | None = None
    batch_size: PositiveInt = 32
    shard_size: PositiveInt = 4096
    workers: NonNegativeInt = 0
    device: str = "auto"
    vae_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"

    @property
    def data(self) -> DataConfig:
        """The settings of the data set to encode. Images are decoded on demand, because each is used once."""
        names = ("kind", "path", "size", "channels", "num_classes", "on_error", "length", "seed")
        return DataConfig(**{name: getattr(self, name) for name in names}, in_memory=False)
