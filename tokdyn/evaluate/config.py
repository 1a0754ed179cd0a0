"""The settings of `tokdyn eval`, checked by pydantic; unknown keys are refused."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PositiveInt, model_validator

from tokdyn.files import UserPath

Metric = Literal["frechet", "score", "kid", "precision_recall", "class_accuracy"]

METRICS: tuple[Metric, ...] = ("frechet", "score", "kid", "precision_recall", "class_accuracy")
INCEPTION = "inception"
TIMM_PREFIX = "timm:"


def _split_commas(value: object) -> object:
    """Split a string such as "frechet,kid" into a list; other values are returned unchanged."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class EvalConfig(BaseModel):
    """Settings of one evaluation.

    Attributes:
        generated: Images to measure: a folder, a zip, or an npz with `arr_0` uint8 (N, H, W, 3) and, if the images have
            classes, `arr_1` integer labels (N,).
        reference: Images to compare with (folder, zip, npz), or statistics: a file written through `cache`, or an npz
            with `mu` (F,) and `sigma` (F, F). `score` and `class_accuracy` need no reference.
        extractor: Network that computes the features: `inception` (the network of FID), the path of a TorchScript file,
            or `timm:NAME`. A TorchScript file is a program: use only files you trust.
        metrics: Metrics to compute; None computes all that the inputs allow.
        batch_size: Images per call of the extractor.
        limit: At most this many generated images, chosen at random with `seed`; None uses all.
        reference_limit: At most this many reference images, chosen at random with `seed`; None uses all.
        input_size: Side in pixels that every image is resized to (short side, then centre crop) before the extractor.
            None leaves images at their own size, except that a timm model gets the size it was trained on.
        weights: A local Inception weights file, instead of the downloaded one. Only with `extractor=inception`.
        checkpoint: Local weights of a timm model (safetensors or a state dict), instead of the pretrained ones.
        cache: A .safetensors file for the reference's features and statistics. If it does not exist, it is written;
            otherwise it is read in place of the reference images, and refused if it belongs to another extractor or
            reference.
        kid_subsets: Number of random subsets that the kernel distance is averaged over (arXiv 1801.01401).
        kid_subset_size: Images per subset; half of the smaller set if that has fewer images, with a note in the result.
        score_splits: Number of parts that the score is averaged over (arXiv 1606.03498); reduced for a small set, with
            a note in the result.
        neighbours: k of precision and recall (arXiv 1904.06991).
        on_error: `raise` stops at the first image that cannot be read; `skip` leaves such images out and lists them in
            the result.
        out: Folder for `evaluation.json`; None writes no file.
        device: `auto` (a GPU if there is one), or a torch device such as `cpu` or `cuda:1`.
        seed: Seed of the random choices above.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    generated: UserPath
    reference: UserPath | None = None
    extractor: Annotated[str, Field(min_length=1)] = INCEPTION
    metrics: Annotated[tuple[Metric, ...] | None, BeforeValidator(_split_commas)] = None
    batch_size: PositiveInt = 64
    limit: Annotated[int, Field(ge=2)] | None = None
    reference_limit: Annotated[int, Field(ge=2)] | None = None
    input_size: PositiveInt | None = None
    weights: UserPath | None = None
    checkpoint: UserPath | None = None
    cache: UserPath | None = None
    kid_subsets: PositiveInt = 100
    kid_subset_size: Annotated[int, Field(ge=2)] = 1000
    score_splits: PositiveInt = 10
    neighbours: PositiveInt = 3
    on_error: Literal["raise", "skip"] = "raise"
    out: UserPath | None = None
    device: str = "auto"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        if self.weights is not None and self.extractor != INCEPTION:
            raise ValueError(f"weights= is for extractor=inception, not for extractor={self.extractor}: remove weights")
        if self.checkpoint is not None and not self.extractor.startswith(TIMM_PREFIX):
            raise ValueError(
                f"checkpoint= is for extractor=timm:NAME, not for extractor={self.extractor}: remove checkpoint"
            )
        if self.cache is not None and self.cache.suffix != ".safetensors":
            raise ValueError(f"cache= must name a .safetensors file, not {self.cache.name}")
        if self.cache is not None and self.reference is None:
            raise ValueError("cache= keeps the statistics of a reference: give reference= too")
        if self.metrics is not None and not self.metrics:
            raise ValueError(
                f"metrics= is empty: name some of {', '.join(METRICS)}, or leave the setting out to compute all"
            )
        return self
