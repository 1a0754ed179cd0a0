"""Settings of `tokdyn features`. They load no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tokdyn.data.config import DataConfig, Size
from tokdyn.limits import BATCH, CLASSES, SAMPLES, WORKERS
from tokdyn.section import Count, Positive, Section, at_most


class FeaturesConfig(Section):
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

    path: str | None = None
    vae: str | None = None
    out: str
    subfolder: str | None = None
    kind: Literal["images", "shapes"] = "images"
    size: Size = 256
    channels: Literal[1, 3, 4] = 3
    num_classes: Annotated[Positive, at_most(CLASSES)] | None = None
    on_error: Literal["raise", "skip"] = "raise"
    length: Annotated[Positive, at_most(SAMPLES)] = 50_000
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    posterior: Literal["mean", "sample"] = "sample"
    flip: bool = False
    dtype: Literal["fp32", "fp16", "bf16"] = "fp16"
    scaling_factor: Annotated[float, Field(gt=0.0)] | None = None
    shift_factor: float | None = None
    batch_size: Annotated[Positive, at_most(BATCH)] = 32
    shard_size: Annotated[Positive, at_most(BATCH)] = 4096
    workers: Annotated[Count, at_most(WORKERS)] = 0
    device: str = "auto"
    vae_dtype: Literal["fp32", "fp16", "bf16"] = "fp32"

    @property
    def data(self) -> DataConfig:
        """The settings of the data set to encode. Images are decoded on demand, because each is used once."""
        names = ("kind", "path", "size", "channels", "num_classes", "on_error", "length", "seed")
        return DataConfig(**{name: getattr(self, name) for name in names}, in_memory=False)
