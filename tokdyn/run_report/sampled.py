"""Sample a run for its report: each budget from the same seeds, with the tokens that were kept and what it cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokdyn.attach import attachment_of, unwrap, wrap
from tokdyn.bench.fidelity import psnr
from tokdyn.bench.flops import measured_parts
from tokdyn.diffusion.guidance import takes_tail_drop
from tokdyn.diffusion.records import StepRecord, StepState
from tokdyn.methods import Method
from tokdyn.report.explorer import NoiseFrame
from tokdyn.report.maps import MapRecorder, Maps
from tokdyn.report.pixels import Pixels
from tokdyn.report.trajectory import Trajectory, join_batches
from tokdyn.run_report.parts import PartCost, part_costs, time_parts
from tokdyn.run_report.settings import Drawing
from tokdyn.sample import SampleConfig
from tokdyn.sample.costs import StepCost, mean_kept, merge_costs, step_costs
from tokdyn.sample.drawing import draw
from tokdyn.sample.job import Job, prepare

_WARM_UP = 2  # steps that are sampled before times count, of the model and of each stack of methods
_MAPS = 4  # steps in the figure of keep maps
_EQUAL = 99.0  # dB that stand for equal images, whose PSNR is infinite


@dataclass(frozen=True)
class Setting:
    """One way to sample a run.

    Attributes:
        tail_drop: share of the kept tokens that is dropped.
        uncond_tail_drop: that of the unconditional branch (Lite-CFG); None takes `tail_drop`.
        methods: methods that are attached while the run is sampled; empty for none.
    """

    tail_drop: float = 0.0
    uncond_tail_drop: float | None = None
    methods: tuple[Method, ...] = ()

    @property
    def name(self) -> str:
        """The name of the setting on pages."""
        if self.methods:
            return " + ".join(type(each).__name__ for each in self.methods)
        lite = "" if self.uncond_tail_drop is None else f", Lite-CFG {self.uncond_tail_drop:g}"
        return f"tail drop {self.tail_drop:g}{lite}"


@dataclass(frozen=True)
class Budget:
    """What a run draws with one budget.

    Attributes:
        setting: how it was sampled.
        images: (N, H, W, 3) uint8.
        kept: kept share, mean over steps, images and branches; None for a model that computes every token.
        gflops: 1e9 FLOPs per image, all steps and branches; a multiply-add is 2 FLOPs. None if not known.
        milliseconds: time per image, all steps.
        psnr: mean PSNR in dB to the images of the run's first budget, the largest; None for that budget itself.
        trajectory: kept share and time of each step.
    """

    setting: Setting
    images: Pixels
    kept: float | None
    gflops: float | None
    milliseconds: float
    psnr: float | None
    trajectory: Trajectory

    @property
    def name(self) -> str:
        """The name of the budget."""
        return self.setting.name

    @property
    def tail_drop(self) -> float:
        """Share of the kept tokens that is dropped."""
        return self.setting.tail_drop


@dataclass(frozen=True)
class Sampled:
    """What was sampled of a run.

    Attributes:
        job: the model, where it came from, and how it was sampled.
        names: class name of each image.
        budgets: one entry per budget, the largest first.
        frames: the first images at each noise level, with the tokens kept at the largest budget; empty for a model that
            computes every token.
        maps: the same as recorded tensors, for figures; None likewise.
        parts: FLOPs and time of each part of the model.
    """

    job: Job
    names: tuple[str, ...]
    budgets: tuple[Budget, ...]
    frames: tuple[NoiseFrame, ...]
    maps: Maps | None
    parts: tuple[PartCost, ...]

    @property
    def parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(parameter.numel() for parameter in self.job.model.parameters())

    @property
    def methods(self) -> str:
        """Names of the attached methods; "none" if there are none."""
        attachment = attachment_of(self.job.model)
        return ", ".join(type(each).__name__ for each in attachment.methods) if attachment is not None else "none"


def open_run(config: Drawing, path: Path | str) -> Job:
    """Load a run for sampling; writes nothing.

    Raises:
        TokdynError: there is no model at the path, or a setting is not possible with it.
    """
    job = prepare(_settings(config, path, config.scheduler))
    if config.scheduler is None and job.scheduler == "ddpm":  # needs many steps
        job = prepare(_settings(config, path, "ddim"))
    return job


def _settings(config: Drawing, path: Path | str, scheduler: Any) -> SampleConfig:
    shared = {name: getattr(config, name) for name in ("count", "seed", "batch_size", "steps", "guidance")}
    more = {name: getattr(config, name) for name in ("vae", "ema", "precision", "device")}
    return SampleConfig(model=str(path), scheduler=scheduler, **shared, **more)


def budgets_of(config: Drawing, job: Job) -> tuple[Setting, ...]:
    """Return how a run is sampled: with each tail drop, or in one way if it computes every token."""
    return tuple(map(Setting, config.tail_drop)) if takes_tail_drop(job.model) else (Setting(),)


def sample_run(config: Drawing, job: Job, settings: Sequence[Setting], advance: Callable[[int], None]) -> Sampled:
    """Sample a run in each of several ways.

    Args:
        config: the settings.
        job: the run, from `open_run`.
        settings: how to sample it; the others are compared with the first.
        advance: moves a progress bar by a number of steps.

    Raises:
        CheckpointError: the model generates values that are not finite.
        InputError: the images of a batch do not fit into memory.
    """
    watch = _Watch(job, config.map_images, MapRecorder(config.steps, config.map_images, _MAPS))
    budgets: list[Budget] = []
    flops: dict[str, float] = {}
    for setting in settings:
        costs: tuple[StepCost, ...] = ()
        images: list[Pixels] = []
        batches: list[list[StepRecord]] = []
        with _attached(job.model, setting.methods):
            if setting.methods or not budgets:
                _draw(job, setting, range(min(config.batch_size, config.count)), None, _WARM_UP)
            for start in range(0, config.count, config.batch_size):
                indices = range(start, min(start + config.batch_size, config.count))

                def callback(step: StepState, watched: bool = not budgets and not images) -> None:
                    if watched:
                        watch(step)
                    advance(1)

                pixels, records = _draw(job, setting, indices, callback, config.steps)
                costs = merge_costs(costs, start, step_costs(job.model, records, len(indices)), len(indices))
                if not flops:
                    flops = measured_parts(job.model, records, len(indices), attachment_of(job.model) is not None)
                images.append(pixels)
                batches.append(records)
        budgets.append(_budget(setting, np.concatenate(images), costs, batches, budgets))
    milliseconds = time_parts(job, min(config.batch_size, config.count))
    parts = part_costs(flops, milliseconds, config.guidance != 1.0)
    maps = watch.recorder.maps() if watch.frames else None
    return Sampled(job, tuple(job.names), tuple(budgets), tuple(watch.frames), maps, parts)


class _Watch:
    """A callback that keeps the noisy images of every step and the tokens that are kept; for models that route tokens.

    Args:
        job: the run.
        images: number of images to keep.
        recorder: records the same for figures.

    Attributes:
        frames: what was kept so far.
        recorder: as given.
    """

    def __init__(self, job: Job, images: int, recorder: MapRecorder) -> None:
        self._job, self._images, self.recorder = job, images, recorder
        self.frames: list[NoiseFrame] = []

    def __call__(self, step: StepState) -> None:
        keep = step.keep()
        if keep is None:
            return
        self.recorder(step)
        shown = keep[: self._images].reshape(-1, *step.routing.grid).cpu().numpy()
        self.frames.append(NoiseFrame(step.level, self._job.decoder(step.x[: self._images]), shown))


@contextmanager
def _attached(model: Any, methods: Sequence[Method]) -> Iterator[None]:
    """Attach methods to a model while the context lasts."""
    if methods:
        wrap(model, methods)
    try:
        yield
    finally:
        if methods:
            unwrap(model)


def _draw(
    job: Job, setting: Setting, indices: range, callback: Callable[[StepState], None] | None, steps: int
) -> tuple[Pixels, list[StepRecord]]:
    """Sample the images with some indices."""
    update = {"scheduler": job.scheduler, "steps": steps, "uncond_tail_drop": setting.uncond_tail_drop}
    sampler = job.config.sampler(setting.tail_drop, job.clip).model_copy(update=update)
    return draw(job, sampler, indices, callback)


def _budget(
    setting: Setting,
    images: Pixels,
    costs: tuple[StepCost, ...],
    batches: list[list[StepRecord]],
    before: list[Budget],
) -> Budget:
    """Return what a budget drew and cost; `before` holds the larger budgets."""
    gflops = [cost.gflops for cost in costs if cost.gflops is not None]
    similarity = None
    if before:
        similarity = float(psnr(torch.from_numpy(images), torch.from_numpy(before[0].images)).clamp(max=_EQUAL).mean())
    return Budget(
        setting=setting,
        images=images,
        kept=mean_kept(costs),
        gflops=sum(gflops) if len(gflops) == len(costs) else None,
        milliseconds=sum(cost.milliseconds for cost in costs),
        psnr=similarity,
        trajectory=join_batches(setting.name, batches, len(images)),
    )
