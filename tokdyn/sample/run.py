"""Run a sampling job: sample the images with each tail drop, batch by batch, then draw the maps and overviews."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
from einops import rearrange

from tokdyn.diffusion.records import StepRecord, StepState
from tokdyn.diffusion.sampling import Callback
from tokdyn.errors import RecipeError
from tokdyn.host import describe, settle_memory
from tokdyn.progress import progress
from tokdyn.report.grids import image_grid
from tokdyn.report.maps import MapRecorder, draw_maps
from tokdyn.report.pixels import Pixels, write_png
from tokdyn.report.trajectory import Trajectory, draw_trajectory, join_batches
from tokdyn.sample.config import SampleConfig
from tokdyn.sample.costs import step_costs
from tokdyn.sample.drawing import draw
from tokdyn.sample.identity import RESULT, earlier_budgets, identity
from tokdyn.sample.job import Job, prepare
from tokdyn.sample.result import BudgetResult, SampleResult
from tokdyn.sample.sinks import FolderSink, GridSink, NpzSink, Sink

_MAPS = "maps.png"
_SIDE_BY_SIDE = 8  # images in the picture that compares budgets


def sample(config: SampleConfig) -> SampleResult:
    """Sample images and write them to the folder `config.out`, with the result in sample.json.

    By `config.format`, the images are in `grid.png`, `images/` or `samples.npz`; if there are several tail drops, each
    has its own folder `tail_drop_X`. With `config.maps`, `maps.png` lies beside the images and `trajectory.png` in
    `out`. If there are several grids, `budgets.png` in `out` compares them. With format=folder, images that exist are
    kept and only missing ones are sampled.

    Raises:
        TokdynError: the model cannot be read, a setting is not possible with it, or the folder holds other images.
    """
    began = perf_counter()
    settle_memory()
    job = prepare(config)
    deciding, budgets = {}, {}
    if config.format == "folder":
        deciding = identity(job)
        budgets = earlier_budgets(job.out, deciding)
    result = SampleResult(
        settings=config,
        identity=deciding,
        model=job.described(),
        used=job.used(),
        budgets=(),
        files=(),
        seconds=0.0,
        machine=describe(job.device),
    )

    def record(budget: BudgetResult) -> None:
        """Keep a result; for a folder of images, also write it to sample.json, so that the job can be resumed."""
        budgets[budget.tail_drop] = budget
        if config.format == "folder":
            result.model_copy(update={"budgets": tuple(budgets.values())}).save(job.out / RESULT)

    sinks = {drop: _sink(job, _folder(job, drop)) for drop in config.tail_drop}
    for drop, sink in sinks.items():
        if config.maps and not sink.missing() and not (_folder(job, drop) / _MAPS).is_file():
            raise RecipeError(
                f"All images of {_folder(job, drop)} exist already, so there is no trajectory to draw maps of: choose "
                "another out, or leave maps off."
            )
    batches = sum(-(-len(sink.missing()) // config.batch_size) for sink in sinks.values())
    trajectories = []
    with progress("sampling", batches * config.steps) as advance:
        for drop, sink in sinks.items():
            start = budgets.get(drop) or BudgetResult(tail_drop=drop)
            existing = config.count - len(sink.missing())
            start = start.model_copy(update={"images": existing, "made": 0, "seconds": 0.0, "images_per_second": None})
            record(start)
            try:
                budget, trajectory = _sample_budget(job, start, sink, advance, record)
            except BaseException:
                sink.discard()
                raise
            record(budget)
            trajectories += [] if trajectory is None else [trajectory]
    outcome = {
        "budgets": tuple(budgets.values()),
        "files": _draw_overviews(job, trajectories, sinks),
        "seconds": perf_counter() - began,
    }
    result = result.model_copy(update=outcome)
    result.save(job.out / RESULT)
    return result


def _sample_budget(
    job: Job,
    budget: BudgetResult,
    sink: Sink,
    advance: Callable[[int], None],
    record: Callable[[BudgetResult], None],
) -> tuple[BudgetResult, Trajectory | None]:
    """Sample the missing images of one tail drop.

    Args:
        job: the job.
        budget: the result so far, of images that exist already.
        sink: writes the images.
        advance: moves the progress bar by a number of steps.
        record: called with the result so far after every batch.

    Returns:
        The result, and the trajectory to draw; None if no image was missing.
    """
    config, missing, drop = job.config, sink.missing(), budget.tail_drop
    names = job.names
    sampler = config.sampler(drop, job.clip)
    recorder = MapRecorder(config.steps, config.map_images, config.map_steps)
    finals: Pixels | None = None
    batches: list[list[StepRecord]] = []
    for start in range(0, len(missing), config.batch_size):
        indices = missing[start : start + config.batch_size]
        callback = _step_callback(recorder if config.maps and finals is None else None, advance)
        pixels, steps = draw(job, sampler, indices, callback)
        sink.write(indices, pixels)
        batches.append(steps)
        finals = pixels[: config.map_images] if finals is None else finals
        budget = budget.with_batch(step_costs(job.model, steps, len(indices)), len(indices))
        record(budget)
    files = [sink.close()]
    path = _folder(job, drop) / _MAPS
    if config.maps and finals is not None:
        shown = [names[index] for index in missing[: len(finals)]]
        title = f"Tokens kept over the trajectory, tail drop {drop:g}"
        draw_maps(recorder.maps(), finals, job.decoder, path, shown, title)
    if config.maps:
        files.append(path)
    trajectory = join_batches(f"tail drop {drop:g}", batches, len(missing)) if batches else None
    return budget.model_copy(update={"files": tuple(files)}), trajectory


def _draw_overviews(job: Job, trajectories: list[Trajectory], sinks: dict[float, Sink]) -> tuple[Path, ...]:
    """Draw the pictures that compare the tail drops, and return their paths."""
    files = []
    if job.config.maps and trajectories:
        files.append(draw_trajectory(trajectories, job.out / "trajectory.png"))
    grids = {drop: np.concatenate(sink.pixels) for drop, sink in sinks.items() if isinstance(sink, GridSink)}
    if len(grids) > 1:
        side_by_side = np.stack([grid[:_SIDE_BY_SIDE] for grid in grids.values()], axis=1)
        page = image_grid(
            rearrange(side_by_side, "image budget h w rgb -> (image budget) h w rgb"),
            columns=len(grids),
            row_titles=job.names[: len(side_by_side)],
            column_titles=[f"tail drop {drop:g}" for drop in grids],
        )
        files.append(write_png(page, job.out / "budgets.png"))
    return tuple(files)


def _folder(job: Job, drop: float) -> Path:
    """Return the folder for the images of one tail drop."""
    return job.out if len(job.config.tail_drop) == 1 else job.out / f"tail_drop_{drop:g}"


def _sink(job: Job, folder: Path) -> Sink:
    """Return the writer of the job's format."""
    if job.config.format == "npz":
        return NpzSink(folder / "samples.npz", job.labels)
    if job.config.format == "folder":
        digits = len(str(job.model.config.num_classes))
        below = [f"{label:0{digits}d}" if job.config.class_folders else "" for label in job.labels]
        return FolderSink(folder / "images", below)
    return GridSink(folder / "grid.png", job.names, job.config.columns)


def _step_callback(recorder: MapRecorder | None, advance: Callable[[int], None]) -> Callback:
    """Return a callback for `generate` that moves the progress bar, and passes each step to the recorder if any."""

    def callback(step: StepState) -> None:
        if recorder is not None:
            recorder(step)
        advance(1)

    return callback
