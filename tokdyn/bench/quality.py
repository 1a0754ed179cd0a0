"""Compare stacks by image quality, FLOPs and time.

A stack is a list of methods that act together on a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from tokdyn.attach import attachment_of, save
from tokdyn.bench import timing
from tokdyn.bench.fidelity import WINDOW, feature_distance, psnr, ssim
from tokdyn.bench.settings import QualityConfig
from tokdyn.bench.stacks import Opened, Stack, open_stack
from tokdyn.data import open_data
from tokdyn.diffusion.sampling import generate
from tokdyn.errors import DataError, RecipeError
from tokdyn.evaluate import EvalConfig, evaluate
from tokdyn.evaluate.extractor import Extractor
from tokdyn.evaluate.features import extract
from tokdyn.evaluate.held_out import held_out_loss
from tokdyn.evaluate.images import ImageSet, open_images
from tokdyn.evaluate.networks import open_extractor
from tokdyn.files import require_folder
from tokdyn.host import open_device, product_type, settle_memory
from tokdyn.progress import progress
from tokdyn.report.pareto import ParetoPoint, frontier
from tokdyn.sample import SampleConfig, sample
from tokdyn.team import ALONE, Team

_BATCH = 100  # images that are compared at once
_RUN_FOLDERS = frozenset({"model", "ema", "checkpoints"})  # folders inside that of a run


@dataclass(frozen=True)
class QualityRow:
    """The measurements of one stack. A value that was not asked for, or that this stack does not have, is None.

    Attributes:
        name: name of the stack.
        model: path of the model.
        parameters: number of parameters of the model.
        methods: class names of the attached methods, outermost first.
        kept: share of the tokens that the blocks compute, mean over steps, images and branches.
        tflops_per_image: 1e12 FLOPs of all steps and branches; a multiply-add is 2 FLOPs.
        milliseconds: milliseconds per image, median over rounds.
        spread: (slowest round - fastest round) / median.
        flops_saved: FLOPs saved, as a share of those of the first stack.
        time_saved: time saved, as a share of that of the first stack.
        held_out: mean diffusion loss on held-out images.
        held_out_error: standard error of `held_out` over images.
        by_level: the held-out loss by noise level, lowest first.
        psnr: mean PSNR in dB to the first stack's images from the same seeds; infinite if a pair of images is equal.
        ssim: mean SSIM to these images; 1 for equal images.
        feature_distance: distance to these images in the features of the extractor: 0 for equal images, about 1 for
            unrelated ones.
        values: metrics of `tokdyn eval`, by name.
        front: whether the stack is on the Pareto front: no other stack has both fewer FLOPs and better quality, as
            measured by `QualityResult.quality`.
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
        """Return a measurement by name: a metric of `values`, or an attribute of the row. None if there is none."""
        value: float | None = (self.values or {}).get(name, getattr(self, name, None))
        return value


@dataclass(frozen=True)
class QualityResult:
    """The result of `bench_quality`.

    Attributes:
        rows: the measurements of each stack.
        quality: name of the measurement that ranks the stacks, lower is better; None if there is none for all stacks.
        places: folder of each stack, with its images and sample.json.
        machine: the machine that times were measured on.
    """

    rows: tuple[QualityRow, ...]
    quality: str | None
    places: tuple[Path, ...]
    machine: dict[str, Any]


def bench_quality(config: QualityConfig, stacks: Sequence[Stack], team: Team = ALONE) -> QualityResult:
    """Draw images from the same seeds with every stack, and measure them.

    The images are written to `config.out`; `tokdyn.bench.quality_page.write_page` writes the table and the plots.

    Args:
        config: what to measure.
        stacks: one stack or more; the first is the one that the others are compared with.
        team: processes that call this function with the same arguments, and share all work but that which is timed. The
            measurements are those of one process, in all of them.

    Raises:
        TokdynError: there are no stacks, a stack cannot be opened, or a setting is not possible with it.
    """
    settle_memory()
    if not stacks:
        raise RecipeError("There are no stacks to measure: give at least one with --stack.")
    require_folder(config.out)
    opened = [open_stack(stack, config.model, config.ema) for stack in stacks]
    if config.held_out is not None:
        _check_held_out(opened)
    given = [stack.model_dump(mode="json") for stack in stacks]
    team.agree("stack or other settings", [config.model_dump(mode="json"), given])
    with team.owning(config.out):
        return _measured(config, opened, team)


def _measured(config: QualityConfig, opened: Sequence[Opened], team: Team) -> QualityResult:
    """Draw and measure the images of opened stacks."""
    places = [config.out / f"{number:02d}" for number in range(len(opened))]
    rows = [_draw(config, each, place, team) for each, place in zip(opened, places, strict=True)]
    if config.held_out is not None:
        rows = [_add_held_out(config, each, row, team) for each, row in zip(opened, rows, strict=True)]
    rows = [_add_fidelity(row, place, places[0], team) for row, place in zip(rows, places, strict=True)]
    if config.extractor is not None:
        rows = _add_feature_distances(config, rows, places, team)
    if config.rounds:
        rows = _add_times(config, opened, rows, team)
    rows = [_add_savings(row, rows[0]) for row in rows]
    quality = _ranking_measurement(rows)
    if quality is not None:
        rows = _mark_front(rows, quality)
    return QualityResult(tuple(rows), quality, tuple(places), team.described(timing.machine()))


def _draw(config: QualityConfig, opened: Opened, place: Path, team: Team) -> QualityRow:
    """Draw the images of one stack into a folder, and return their cost."""
    stack, methods_folder = opened.stack, None
    attachment = attachment_of(opened.model)
    if attachment is not None and attachment.methods:
        methods_folder = place / "methods"
        with team.after_first():
            if team.first:
                save(opened.model, methods_folder)
    settings = SampleConfig(
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
        methods=methods_folder,
        ema=config.ema,
        uncond_tail_drop=stack.uncond_tail_drop if config.guidance != 1.0 else None,
        precision=config.precision,
        device=config.device,
    )
    budget = sample(settings, team).budgets[0]
    return QualityRow(
        name=stack.name,
        model=str(opened.info.path),
        parameters=sum(parameter.numel() for parameter in opened.model.parameters()),
        methods=tuple(type(each).__name__ for each in attachment.methods) if attachment is not None else (),
        kept=budget.kept,
        tflops_per_image=budget.tflops_per_image,
    )


def _check_held_out(opened: Sequence[Opened]) -> None:
    """Raise a RecipeError if the training data of a model is not known, because held-out data is read like it."""
    for each in opened:
        if each.info.data is None:
            raise RecipeError(
                f"{each.info.path} does not record what it was trained on, so held_out cannot be read: remove held_out."
            )


def _add_held_out(config: QualityConfig, opened: Opened, row: QualityRow, team: Team) -> QualityRow:
    """Add the held-out loss to a row, unless a method reuses results of the step before, such as FeatureCache."""
    attachment = attachment_of(opened.model)
    if attachment is not None and attachment.remembers:
        return row
    assert opened.info.data is not None
    trained = opened.info.data
    kind = "images" if trained.kind == "shapes" else trained.kind  # shapes are drawn, and read from nowhere
    data = open_data(trained.model_copy(update={"kind": kind, "path": str(config.held_out), "flip": False}))
    opened.model.to(open_device(config.device))
    result = held_out_loss(
        opened.model, opened.objective, data, images=config.held_out_count, tail_drop=opened.stack.tail_drop, team=team
    )
    return replace(row, held_out=result.loss, held_out_error=result.spread, by_level=result.by_level)


def _add_fidelity(row: QualityRow, place: Path, first: Path, team: Team) -> QualityRow:
    """Add PSNR and SSIM to the images of the first stack; a row of the first stack itself is returned unchanged."""
    if place == first:
        return row
    images, references = open_images(place), open_images(first)
    parts = [range(start, min(start + _BATCH, len(images))) for start in range(0, len(images), _BATCH)]
    found = []
    for part in team.share(parts):
        batch, reference = _pixels(images, part), _pixels(references, part)
        similar = ssim(batch, reference).tolist() if min(batch.shape[-2:]) >= WINDOW else []
        found.append([psnr(batch, reference).tolist(), similar])
    psnrs, ssims = zip(*team.in_order(team.exchange(found)), strict=True)
    ratios, similarities = (torch.tensor(list(chain(*each)), dtype=torch.float64) for each in (psnrs, ssims))
    return replace(row, psnr=ratios.mean().item(), ssim=similarities.mean().item() if len(similarities) else None)


def _pixels(images: ImageSet, part: range) -> Tensor:
    """Read the images with some indices as (B, 3, H, W) uint8."""
    readable = [image for image in images.images(list(part), None) if not isinstance(image, DataError)]
    if len(readable) < len(part):
        raise DataError(f"{images.path} holds images that cannot be read: remove them, and run the command again.")
    return rearrange(torch.from_numpy(np.stack(readable)), "b h w c -> b c h w")


def _add_feature_distances(
    config: QualityConfig, rows: Sequence[QualityRow], places: Sequence[Path], team: Team
) -> list[QualityRow]:
    """Add feature distances to the first stack's images and, if there is a reference, the metrics of `tokdyn eval`."""
    settings: dict[str, Any] = {"extractor": config.extractor, "device": config.device, "reference": config.reference}
    if config.reference is not None:
        settings["cache"] = config.out / "reference.safetensors"
    measured, first, extractor = [], None, None
    for row, place in zip(rows, places, strict=True):
        evaluation = EvalConfig(generated=place, **settings)
        if extractor is None:
            with team.after_first():
                extractor = open_extractor(evaluation)
        features = _features(extractor, evaluation, place, team)
        first = features if first is None else first
        distance = None
        if features is not None and first is not None and features is not first:
            distance = feature_distance(features, first)
        values = evaluate(evaluation, team).values if config.reference is not None else None
        measured.append(replace(row, feature_distance=team.from_first(distance), values=values))
    return measured


def _features(extractor: Extractor, config: EvalConfig, place: Path, team: Team) -> Tensor | None:
    """Return the features (N, F) of the images in a folder; None outside the first process."""
    images = open_images(place)
    title = f"features of {place.name}"
    extracted = extract(title, images, np.arange(len(images)), extractor, config.batch_size, "raise", team)
    return None if extracted is None else extracted.features


def _add_times(
    config: QualityConfig, opened: Sequence[Opened], rows: Sequence[QualityRow], team: Team
) -> list[QualityRow]:
    """Add times: all stacks draw a batch with the same labels and seeds, in turn, in the first process alone."""
    times = team.from_first(_times(config, opened) if team.first else None)
    return [
        replace(
            row,
            milliseconds=time["median_ms"] / config.timed,
            spread=(time["max_ms"] - time["min_ms"]) / time["median_ms"],
        )
        for row, time in zip(rows, times, strict=True)
    ]


def _times(config: QualityConfig, opened: Sequence[Opened]) -> list[dict[str, float]]:
    """Time each stack, on a batch with the same labels and seeds, in turn."""
    device = open_device(config.device)
    dtype, labels = product_type(config.precision, device), opened[0].labels(config.timed)
    seeds = [config.seed + number for number in range(config.timed)]

    with progress("timing", (config.rounds + 1) * len(opened)) as advance:

        def draw(each: Opened) -> None:
            sampler = each.sampler(config.scheduler, config.steps, config.guidance)
            generate(each.model, sampler, each.objective, labels, seeds, dtype=dtype)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            advance(1)

        for each in opened:
            each.model.to(device)
        draws = {str(number): partial(draw, each) for number, each in enumerate(opened)}
        return list(timing.in_turn(draws, rounds=config.rounds, warmup=1).values())


def _add_savings(row: QualityRow, first: QualityRow) -> QualityRow:
    """Add the shares of the first stack's FLOPs and time that a stack saves."""
    if row is first:
        return row

    def saved(value: float | None, reference: float | None) -> float | None:
        return None if value is None or not reference else 1.0 - value / reference

    return replace(
        row,
        flops_saved=saved(row.tflops_per_image, first.tflops_per_image),
        time_saved=saved(row.milliseconds, first.milliseconds),
    )


def _ranking_measurement(rows: Sequence[QualityRow]) -> str | None:
    """Return the name of the measurement that ranks the stacks, or None if no suitable one exists for all of them.

    A Frechet distance is preferred to the feature distance to the first stack, and that to the held-out loss.
    """
    names = [name for name in rows[0].values or () if name.lower().startswith(("frechet", "fid"))]
    for name in (*names, "feature_distance", "held_out"):
        if all(row.quality(name) is not None for row in rows[1 if name == "feature_distance" else 0 :]):
            return name
    return None


def _mark_front(rows: Sequence[QualityRow], quality: str) -> list[QualityRow]:
    """Set `front` in the rows that no other row beats in both FLOPs and quality."""
    points = points_of(rows, quality)
    best = {point.label for point in frontier(points)}
    return [replace(row, front=row.name in best) for row in rows]


def points_of(rows: Sequence[QualityRow], quality: str) -> list[ParetoPoint]:
    """Return a point of a plot, in GFLOPs per image, for each row that has a cost and a quality.

    Args:
        rows: the rows. The first stack has the feature distance 0, because it is compared with itself.
        quality: name of the measurement of quality.
    """
    points = []
    for row in rows:
        value = row.quality(quality)
        if value is None and quality == "feature_distance":
            value = 0.0
        if value is not None and row.tflops_per_image is not None:
            folders = reversed(Path(row.model).parts)
            run = next(part for part in folders if part not in _RUN_FOLDERS and "step_" not in part)
            points.append(ParetoPoint(series=run, label=row.name, cost=1e3 * row.tflops_per_image, quality=value))
    return points
