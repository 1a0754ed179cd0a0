"""The sampling run: every budget batch by batch, then the pictures about it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np

from tokdyn.data.progress import progress
from tokdyn.diffusion.records import StepRecord, StepState
from tokdyn.diffusion.sampling import Callback, generate
from tokdyn.host import describe, settle_memory
from tokdyn.report.grids import image_grid
from tokdyn.report.maps import MapRecorder, draw_maps
from tokdyn.report.pixels import Pixels, write_png
from tokdyn.report.trajectory import Trajectory, draw_trajectory, trajectory
from tokdyn.sample.config import SampleConfig
from tokdyn.sample.identity import RESULT, identity, refuse_other_images
from tokdyn.sample.job import Job, prepare
from tokdyn.sample.result import BudgetResult, SampleResult, mean_kept, step_costs
from tokdyn.sample.sinks import FolderSink, GridSink, NpzSink, Sink

_SIDE_BY_SIDE = 8  # images in the picture that compares budgets


def sample(config: SampleConfig) -> SampleResult:
    """Make images and write them, with sample.json beside them.

    Files in ``out`` (in ``out/tail_drop_X`` for each budget, if there are several): `grid.png`, or `images/`, or
    `samples.npz`; with ``maps`` also `maps.png`, and `trajectory.png` in ``out``; for several grids `budgets.png`.
    A folder of images is continued: those that exist are kept.

    Raises:
        TokdynError: a setting, the model or the folder does not fit.
    """
    began = perf_counter()
    settle_memory()
    job = prepare(config)
    continued = identity(job) if config.format == "folder" else {}
    result = SampleResult(
        settings=config,
        identity=continued,
        model=job.described(),
        used=job.used(),
        budgets=(),
        files=(),
        seconds=0.0,
        machine=describe(job.device),
    )
    if config.format == "folder":
        refuse_other_images(job.out, continued)
        result.save(job.out / RESULT)  # so that an interrupted run can be continued
    sinks = {drop: _sink(job, _folder(job, drop)) for drop in config.tail_drop}
    batches = sum(-(-len(sink.missing()) // config.batch_size) for sink in sinks.values())
    budgets, runs = [], []
    with progress("sampling", batches * config.steps) as advance:
        for drop, sink in sinks.items():
            budget, run = _budget(job, drop, sink, advance)
            budgets.append(budget)
            runs += [] if run is None else [run]
    done = {"budgets": tuple(budgets), "files": _overviews(job, runs, sinks), "seconds": perf_counter() - began}
    result = result.model_copy(update=done)
    result.save(job.out / RESULT)
    return result


def _budget(
    job: Job, drop: float, sink: Sink, advance: Callable[[int], None]
) -> tuple[BudgetResult, Trajectory | None]:
    """Make the missing images of one tail drop."""
    config, missing = job.config, sink.missing()
    labels, names = job.labels, job.names
    sampler = config.sampler(drop, job.clip)
    recorder = MapRecorder(config.steps, config.map_images, config.map_steps)
    finals: Pixels | None = None
    batches: list[list[StepRecord]] = []
    for start in range(0, len(missing), config.batch_size):
        indices = missing[start : start + config.batch_size]
        generation = generate(
            job.model,
            sampler,
            job.objective,
            [labels[index] for index in indices],
            [config.seed + index for index in indices],
            callback=_watch(recorder if config.maps and finals is None else None, advance),
            dtype=job.dtype,
        )
        pixels = job.decoder(generation.images)
        sink.write(indices, pixels)
        batches.append(generation.steps)
        finals = pixels[: config.map_images] if finals is None else finals
    files = [sink.close()]
    if config.maps and finals is not None:
        shown = [names[index] for index in missing[: len(finals)]]
        title = f"Tokens kept over the trajectory, tail drop {drop:g}"
        path = _folder(job, drop) / "maps.png"
        files.append(draw_maps(recorder.maps(), finals, job.decoder, path, shown, title))
    run = trajectory(f"tail drop {drop:g}", batches, len(missing)) if batches else None
    seconds = sum(record.seconds for batch in batches for record in batch)
    costs = () if run is None else step_costs(job.model, batches[0], run)
    budget = BudgetResult(
        tail_drop=drop,
        images=config.count,
        made=len(missing),
        seconds=seconds,
        images_per_second=len(missing) / seconds if batches else None,
        kept=None if run is None else mean_kept(run),
        tflops_per_image=sum(cost.gflops for cost in costs) / 1e3 if costs else None,
        steps=costs,
        files=tuple(files),
    )
    return budget, run


def _overviews(job: Job, runs: list[Trajectory], sinks: dict[float, Sink]) -> tuple[Path, ...]:
    """Pictures of all budgets together."""
    files = []
    if job.config.maps and runs:
        files.append(draw_trajectory(runs, job.out / "trajectory.png"))
    grids = {drop: np.concatenate(sink.pixels) for drop, sink in sinks.items() if isinstance(sink, GridSink)}
    if len(grids) > 1:
        side_by_side = np.stack([grid[:_SIDE_BY_SIDE] for grid in grids.values()], axis=1)
        page = image_grid(
            side_by_side.reshape(-1, *side_by_side.shape[2:]),
            columns=len(grids),
            row_titles=job.names[: len(side_by_side)],
            column_titles=[f"tail drop {drop:g}" for drop in grids],
        )
        files.append(write_png(page, job.out / "budgets.png"))
    return tuple(files)


def _folder(job: Job, drop: float) -> Path:
    return job.out if len(job.config.tail_drop) == 1 else job.out / f"tail_drop_{drop:g}"


def _sink(job: Job, folder: Path) -> Sink:
    if job.config.format == "npz":
        return NpzSink(folder / "samples.npz", job.labels)
    if job.config.format == "folder":
        digits = len(str(job.model.config.num_classes))
        below = [f"{label:0{digits}d}" if job.config.class_folders else "" for label in job.labels]
        return FolderSink(folder / "images", below)
    return GridSink(folder / "grid.png", job.names, job.config.columns)


def _watch(recorder: MapRecorder | None, advance: Callable[[int], None]) -> Callback:
    """A callback that moves the progress bar and feeds the recorder."""

    def watch(step: StepState) -> None:
        if recorder is not None:
            recorder(step)
        advance(1)

    return watch
