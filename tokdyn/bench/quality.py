"""What stacks do to images: quality, FLOPs and time beside each other, against the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import Tensor

from tokdyn.attach.entry import attachment_of
from tokdyn.attach.sidecar import save
from tokdyn.bench import timing
from tokdyn.bench.fidelity import SMALLEST, feature_distance, psnr, ssim
from tokdyn.bench.stacks import Opened, Stack, open_stack
from tokdyn.data import open_data
from tokdyn.diffusion.sampling import GuidanceScale, Steps, generate
from tokdyn.diffusion.schedulers import SchedulerName
from tokdyn.errors import DataError, RecipeError
from tokdyn.evaluate import EvalConfig, evaluate
from tokdyn.evaluate.extractor import Extractor
from tokdyn.evaluate.features import extract
from tokdyn.evaluate.held_out import held_out_loss
from tokdyn.evaluate.images import ImageSet, open_images
from tokdyn.evaluate.networks import open_extractor
from tokdyn.files import UserPath, require_folder
from tokdyn.host import open_device, product_type, settle_memory
from tokdyn.methods import FeatureCache
from tokdyn.progress import progress
from tokdyn.report.pareto import ParetoPoint, frontier
from tokdyn.sample import SampleConfig, sample

_BATCH = 100  # images that are compared at a time
_INSIDE = frozenset({"model", "ema", "checkpoints"})  # folders of a run


class QualityConfig(BaseModel):
    """Settings of `tokdyn bench quality`.

    Attributes:
        model: What `tokdyn sample` takes, for stacks that name no model of their own.
        out: Folder to write to; images that are there are kept.
        count: Images per stack; image i starts from seed + i in every stack.
        seed: Of the first image.
        batch_size: Images per model call, before guidance doubles it.
        scheduler: `ddpm`, `ddim` or `dpm` for a noise objective, `euler` for a flow; null takes ddpm or euler.
        steps: Model calls per image.
        guidance: Scale of classifier-free guidance; 1 means none.
        held_out: Images (folder or zip) or latents that no model was trained on, for the diffusion loss.
        held_out_count: How many of them.
        reference: Images, or statistics, that generated ones are compared with, as in `tokdyn eval`.
        extractor: Network of the distances, as in `tokdyn eval`; null leaves distances out.
        rounds: Each stack draws a batch in turn this often, and the median time counts; 0 measures no time.
        timed: Images in such a batch.
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
    def _fits(self) -> Self:
        if self.reference is not None and self.extractor is None:
            raise ValueError("reference has no effect without extractor: name the network of the distances")
        return self


@dataclass(frozen=True)
class QualityRow:
    """One stack. None where a number was not asked for, or does not exist.

    Attributes:
        name: of the stack.
        model: its path.
        parameters: of the model.
        methods: names of those that act, outermost first.
        kept: mean share of tokens over steps, images and branches.
        tflops_per_image: 1e12 FLOPs, all steps and branches; a multiply-add is 2 FLOPs.
        milliseconds: per image, median over rounds; `spread` is the range of the rounds over it.
        spread: see `milliseconds`.
        flops_saved: share of the first stack's FLOPs that is saved.
        time_saved: the same of its time.
        held_out: mean diffusion loss; `held_out_error` is its standard error over images.
        held_out_error: see `held_out`.
        by_level: the loss by noise level, clean first.
        psnr: to the first stack's images of the same seeds, mean in dB; infinite where all are equal.
        ssim: the same, 1 for equal images.
        feature_distance: the same in the features of the extractor; 1 for images that have nothing to do with them.
        values: of `tokdyn eval`, by name.
        front: no other stack has both fewer FLOPs and better quality (see `QualityResult.quality`).
    """

    name: str
    model: str
    parameters: int
    methods: tuple[str, ...]
    kept: float | None = None
    tflops_per_image: float | None = None
    milliseconds: float | None = None
    spread: float | None = None
    flops_saved: float | None = None
    time_saved: float | None = None
    held_out: float | None = None
    held_out_error: float | None = None
    by_level: tuple[float | None, ...] | None = None
    psnr: float | None = None
    ssim: float | None = None
    feature_distance: float | None = None
    values: dict[str, float] | None = None
    front: bool = False

    def quality(self, name: str) -> float | None:
        """The number of that name: a field, or one of `values`."""
        found: float | None = (self.values or {}).get(name, getattr(self, name, None))
        return found


@dataclass(frozen=True)
class QualityResult:
    """What `bench_quality` found.

    Attributes:
        rows: one per stack.
        quality: name of the number that the front was drawn for, the lower the better; None if there was none.
        places: folder of each stack, with its images and sample.json.
        machine: that times were measured on.
    """

    rows: tuple[QualityRow, ...]
    quality: str | None
    places: tuple[Path, ...]
    machine: dict[str, Any]


def bench_quality(config: QualityConfig, stacks: Sequence[Stack]) -> QualityResult:
    """Draw the same images with every stack and measure them; `quality_page.write_page` shows the result.

    Args:
        config: how.
        stacks: at least one; the first is what the others are compared with.

    Raises:
        TokdynError: a stack does not open, or the settings do not fit it.
    """
    settle_memory()
    if not stacks:
        raise RecipeError("there is no stack to measure: give at least one.")
    require_folder(config.out)
    opened = [open_stack(stack, config.model, config.ema) for stack in stacks]
    if config.held_out is not None:
        _check_held_out(opened)
    places = [config.out / f"{number:02d}" for number in range(len(stacks))]
    rows = [_drawn(config, each, place) for each, place in zip(opened, places, strict=True)]
    if config.held_out is not None:
        rows = [_held_out(config, each, row) for each, row in zip(opened, rows, strict=True)]
    rows = [_close(row, place, places[0]) for row, place in zip(rows, places, strict=True)]
    if config.extractor is not None:
        rows = _judged(config, rows, places)
    if config.rounds:
        rows = _timed(config, opened, rows)
    rows = [_compared(row, rows[0]) for row in rows]
    quality = _deciding(rows)
    if quality is not None:
        rows = _front(rows, quality)
    return QualityResult(tuple(rows), quality, tuple(places), timing.machine())


def _drawn(config: QualityConfig, opened: Opened, place: Path) -> QualityRow:
    """Images of one stack, and what they cost."""
    stack, methods = opened.stack, None
    carried = attachment_of(opened.model)
    if carried is not None and carried.methods:
        methods = save(opened.model, place / "methods")
    wanted = SampleConfig(
        model=str(opened.info.path),
        out=place,
        format="folder",
        class_folders=True,
        count=config.count,
        seed=config.seed,
        batch_size=config.batch_size,
        scheduler=config.scheduler,
        steps=config.steps,
        guidance=config.guidance,
        tail_drop=(stack.tail_drop,) if isinstance(stack.tail_drop, float) else (0.0,),
        drop_curve=None if isinstance(stack.tail_drop, float) else stack.tail_drop,
        methods=methods,
        ema=config.ema,
        uncond_tail_drop=stack.uncond_tail_drop if config.guidance != 1.0 else None,
        precision=config.precision,
        device=config.device,
    )
    made = sample(wanted).budgets[0]
    return QualityRow(
        name=stack.name,
        model=str(opened.info.path),
        parameters=sum(parameter.numel() for parameter in opened.model.parameters()),
        methods=tuple(type(each).__name__ for each in carried.methods) if carried is not None else (),
        kept=made.kept,
        tflops_per_image=made.tflops_per_image,
    )


def _check_held_out(opened: Sequence[Opened]) -> None:
    for each in opened:
        if each.info.data is None:
            raise RecipeError(
                f"{each.info.path} does not say what it was trained on, so held_out cannot be read; leave it out."
            )


def _held_out(config: QualityConfig, opened: Opened, row: QualityRow) -> QualityRow:
    """The diffusion loss; a cache has none, as what it does depends on the step before."""
    carried = attachment_of(opened.model)
    if carried is not None and carried.has(FeatureCache):
        return row
    assert opened.info.data is not None
    data = open_data(opened.info.data.model_copy(update={"path": str(config.held_out), "flip": False}))
    opened.model.to(open_device(config.device))
    found = held_out_loss(
        opened.model, opened.objective, data, images=config.held_out_count, tail_drop=opened.stack.tail_drop
    )
    return replace(row, held_out=found.loss, held_out_error=found.spread, by_level=found.by_level)


def _close(row: QualityRow, place: Path, first: Path) -> QualityRow:
    """How close the images are to those of the first stack."""
    if place == first:
        return row
    mine, theirs = open_images(place), open_images(first)
    noise, structure = [], []
    for start in range(0, len(mine), _BATCH):
        part = range(start, min(start + _BATCH, len(mine)))
        one, other = _pixels(mine, part), _pixels(theirs, part)
        noise.append(psnr(one, other))
        if min(one.shape[-2:]) >= SMALLEST:
            structure.append(ssim(one, other))
    similarity = torch.cat(structure).mean().item() if structure else None
    return replace(row, psnr=torch.cat(noise).mean().item(), ssim=similarity)


def _pixels(images: ImageSet, part: range) -> Tensor:
    """(B, 3, H, W) uint8."""
    found = [image for image in images.images(list(part), None) if not isinstance(image, DataError)]
    if len(found) < len(part):
        raise DataError(f"images of {images.path} cannot be read; remove them, and they are made again.")
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def _judged(config: QualityConfig, rows: Sequence[QualityRow], places: Sequence[Path]) -> list[QualityRow]:
    """Distances in the features of a network: to the first stack's images, and to the reference."""
    settings: dict[str, Any] = {"extractor": config.extractor, "device": config.device, "reference": config.reference}
    if config.reference is not None:
        settings["cache"] = config.out / "reference.safetensors"
    judged, first, extractor = [], None, None
    for row, place in zip(rows, places, strict=True):
        measured = EvalConfig(generated=place, **settings)
        extractor = extractor or open_extractor(measured)
        features = _features(extractor, measured, place)
        first = features if first is None else first
        distance = None if first is features else feature_distance(features, first)
        values = evaluate(measured).values if config.reference is not None else None
        judged.append(replace(row, feature_distance=distance, values=values))
    return judged


def _features(extractor: Extractor, config: EvalConfig, place: Path) -> Tensor:
    images = open_images(place)
    with progress(f"features of {place.name}", len(images)) as advance:
        return extract(images, np.arange(len(images)), extractor, config.batch_size, "raise", advance).features


def _timed(config: QualityConfig, opened: Sequence[Opened], rows: Sequence[QualityRow]) -> list[QualityRow]:
    """Medians of the same batch drawn by all stacks in turn."""
    device = open_device(config.device)
    half, labels = product_type(config.precision, device), opened[0].labels(config.timed)
    seeds = [config.seed + number for number in range(config.timed)]

    with progress("timing", (config.rounds + 1) * len(opened)) as advance:

        def draw(each: Opened) -> None:
            sampler = each.sampler(config.scheduler, config.steps, config.guidance)
            generate(each.model, sampler, each.objective, labels, seeds, dtype=half)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            advance(1)

        for each in opened:
            each.model.to(device)
        sides = {str(number): partial(draw, each) for number, each in enumerate(opened)}
        times = timing.in_turn(sides, rounds=config.rounds, warmup=1)
    return [
        replace(
            row,
            milliseconds=found["median_ms"] / config.timed,
            spread=(found["max_ms"] - found["min_ms"]) / found["median_ms"],
        )
        for row, found in zip(rows, times.values(), strict=True)
    ]


def _compared(row: QualityRow, first: QualityRow) -> QualityRow:
    """What is saved of the first stack's FLOPs and time."""
    if row is first:
        return row

    def saved(mine: float | None, theirs: float | None) -> float | None:
        return None if mine is None or not theirs else 1.0 - mine / theirs

    return replace(
        row,
        flops_saved=saved(row.tflops_per_image, first.tflops_per_image),
        time_saved=saved(row.milliseconds, first.milliseconds),
    )


def _deciding(rows: Sequence[QualityRow]) -> str | None:
    """The number that stacks are ranked by: a Frechet distance, else the distance to the first stack, else the loss."""
    names = [name for name in rows[0].values or () if name.lower().startswith(("frechet", "fid"))]
    for name in (*names, "feature_distance", "held_out"):
        if all(row.quality(name) is not None for row in rows[1 if name == "feature_distance" else 0 :]):
            return name
    return None


def _front(rows: Sequence[QualityRow], quality: str) -> list[QualityRow]:
    """Mark the rows that no other one beats in both FLOPs and quality."""
    points = points_of(rows, quality)
    best = {point.label for point in frontier(points)}
    return [replace(row, front=row.name in best) for row in rows]


def points_of(rows: Sequence[QualityRow], quality: str) -> list[ParetoPoint]:
    """Rows whose cost and quality are known, as points of a picture; the first is at no distance to itself."""
    points = []
    for row in rows:
        value = row.quality(quality)
        if value is None and quality == "feature_distance":
            value = 0.0
        if value is not None and row.tflops_per_image is not None:
            run = next(part for part in reversed(Path(row.model).parts) if part not in _INSIDE and "step_" not in part)
            points.append(ParetoPoint(series=run, label=row.name, cost=row.tflops_per_image, quality=value))
    return points
