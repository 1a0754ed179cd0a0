"""Run a sampling job: sample the images with each tail drop, batch by batch, then draw the maps and overviews.

A job can be shared by several processes (`tokdyn.team`). The first one writes what is not one image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, repeat
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
from tokdyn.sample.identity import RESULT, earlier_budgets, identity
from tokdyn.sample.job import Job, prepare
from tokdyn.sample.result import BudgetResult, SampleResult
from tokdyn.sample.rounds import batches_of, rounds
from tokdyn.sample.sinks import FolderSink, GridSink, NpzSink, Sink
from tokdyn.team import ALONE, Team

_MAPS = "maps.png"
_SIDE_BY_SIDE = 8  # images in the picture that compares budgets


def sample(config: SampleConfig, team: Team = ALONE) -> SampleResult:
    """Sample images and write them to the folder `config.out`, with the result in sample.json.

    By `config.format`, the images are in `grid.png`, `images/` or `samples.npz`; if there are several tail drops, each
    has its own folder `tail_drop_X`. With `config.maps`, `maps.png` lies beside the images and `trajectory.png` in
    `out`. If there are several grids, `budgets.png` in `out` compares them. With format=folder, images that exist are
    kept and only missing ones are sampled.

    Args:
        config: the settings.
        team: processes that call this function with the same settings, each of which samples a share of the batches.
            The files are those that one process writes.

    Returns:
        The result, the same in all processes.

    Raises:
        TokdynError: the model cannot be read, a setting is not possible with it, or the folder holds other images or is
            in use.
    """
    began = perf_counter()
    settle_memory()
    job = prepare(config)
    resumable = config.format == "folder"
    deciding = identity(job) if resumable or team.count > 1 else {}
    team.agree("model or other settings", [config.model_dump(mode="json"), deciding])
    result = SampleResult(
        settings=config,
        identity=deciding if resumable else {},
        model=job.described(),
        used=job.used(),
        budgets=(),
        files=(),
        seconds=0.0,
        machine=team.described(describe(job.device)),
    )
    with team.owning(job.out):
        result = _sample_budgets(job, team, result)
        if team.first:
            result = result.model_copy(update={"seconds": perf_counter() - began})
            result.save(job.out / RESULT)
        found = team.from_first(result.model_dump(mode="json"))
    return result if team.first else SampleResult.model_validate(found)


def _sample_budgets(job: Job, team: Team, result: SampleResult) -> SampleResult:
    """Sample the missing images of all tail drops, and return the result; outside the first process without costs."""
    config, resumable = job.config, job.config.format == "folder"
    budgets = earlier_budgets(job.out, result.identity) if resumable and team.first else {}

    def record(budget: BudgetResult) -> None:
        """Keep a result; for a folder of images, also write it to sample.json, so that the job can be resumed."""
        budgets[budget.tail_drop] = budget
        if resumable and team.first:
            result.model_copy(update={"budgets": tuple(budgets.values())}).save(job.out / RESULT)

    sinks = {drop: _sink(job, _folder(job, drop)) for drop in config.tail_drop}
    missing: list[list[int]] = team.from_first([sink.missing() for sink in sinks.values()] if team.first else None)
    for drop, numbers in zip(sinks, missing, strict=True):
        if team.first and config.maps and not numbers and not (_folder(job, drop) / _MAPS).is_file():
            raise RecipeError(
                f"All images of {_folder(job, drop)} exist already, so there is no trajectory to draw maps of: choose "
                "another out, or leave maps off."
            )
    batches = [batches_of(numbers, config.batch_size) for numbers in missing]
    trajectories = []
    with progress("sampling", sum(len(team.share(each)) for each in batches) * config.steps) as advance:
        for (drop, sink), numbers, parts in zip(sinks.items(), missing, batches, strict=True):
            start = budgets.get(drop) or BudgetResult(tail_drop=drop)
            existing = config.count - len(numbers)
            start = start.model_copy(update={"images": existing, "made": 0, "seconds": 0.0, "images_per_second": None})
            record(start)
            try:
                budget, trajectory = _sample_budget(job, team, start, sink, parts, advance, record)
            except BaseException:
                sink.discard()
                raise
            record(budget)
            trajectories += [] if trajectory is None else [trajectory]
    files = _draw_overviews(job, trajectories, sinks) if team.first else ()
    return result.model_copy(update={"budgets": tuple(budgets.values()), "files": files})


def _sample_budget(
    job: Job,
    team: Team,
    budget: BudgetResult,
    sink: Sink,
    parts: Sequence[Sequence[int]],
    advance: Callable[[int], None],
    record: Callable[[BudgetResult], None],
) -> tuple[BudgetResult, Trajectory | None]:
    """Sample the missing images of one tail drop.

    Args:
        job: the job.
        team: the processes.
        budget: the result so far, of images that exist already.
        sink: writes the images.
        parts: the numbers of the missing images of each batch.
        advance: moves the progress bar by a number of steps of this process.
        record: called with the result so far after every round of batches.

    Returns:
        The result, and the trajectory to draw; None if no image was missing, and outside the first process.
    """
    config, drop = job.config, budget.tail_drop
    recorder = MapRecorder(config.steps, config.map_images, config.map_steps)
    mapped = config.maps and team.first and bool(parts)
    callbacks = chain([_step_callback(recorder if mapped else None, advance)], repeat(_step_callback(None, advance)))
    finals: Pixels | None = None
    batches: list[tuple[StepRecord, ...]] = []
    for made, pixels in rounds(job, team, config.sampler(drop, job.clip), parts, sink, callbacks):
        batches += [batch.records for batch in made]
        finals = pixels[: config.map_images] if finals is None and pixels is not None else finals
        budget = budget.with_batches(made)
        record(budget)
    if not team.first:
        return budget, None
    files = [sink.close()]
    path = _folder(job, drop) / _MAPS
    if mapped and finals is not None:
        names = job.names
        shown = [names[number] for number in parts[0][: len(finals)]]
        title = f"Tokens kept over the trajectory, tail drop {drop:g}"
        draw_maps(recorder.maps(), finals, job.decoder, path, shown, title)
    trajectory = None
    if config.maps:
        files.append(path)
        images = sum(map(len, parts))
        trajectory = join_batches(f"tail drop {drop:g}", batches, images) if batches else None
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
