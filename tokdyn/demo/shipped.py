"""Show what the shipped models do, without training: a DC-DiT at four budgets, and a DiT with two stacks of methods."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from tokdyn.bases.locating import locate
from tokdyn.demo.settings import DCDIT, DIT, DemoSettings
from tokdyn.errors import RecipeError
from tokdyn.files import json_object
from tokdyn.methods import DepthSkip, FeatureCache, TokenMerge
from tokdyn.recipe.explain import explain
from tokdyn.run_report.build import Run, build, gather
from tokdyn.run_report.build import sampled as sampled_of
from tokdyn.run_report.sampled import Budget, Setting
from tokdyn.run_report.settings import ReportConfig

DROPS = (0.0, 0.2, 0.4, 0.6)
LITE = 0.9
"""Tail drop of the unconditional branch with Lite-CFG."""
STACKS = (
    (FeatureCache(threshold=0.2), TokenMerge(ratio=0.3)),
    (FeatureCache(threshold=0.2), DepthSkip(blocks=(3,))),
)


@dataclass(frozen=True)
class ShownRow:
    """What one setting of a shipped model costs, and how its images differ from those of the full model.

    Attributes:
        model: name of the model.
        setting: tail drops, or the methods.
        tokens: mean number of tokens that a call computes.
        cells: number of tokens of the grid.
        gflops: 1e9 FLOPs per image, all steps and guidance branches; a multiply-add is 2 FLOPs.
        milliseconds: time per image, all steps.
        psnr: mean PSNR in dB to the images of the full model from the same seeds; None for the full model itself.
    """

    model: str
    setting: str
    tokens: float
    cells: int
    gflops: float | None
    milliseconds: float
    psnr: float | None


@dataclass(frozen=True)
class Shown:
    """The result of `show`.

    Attributes:
        page: the page that was written.
        steps: sampling steps per image.
        guidance: scale of guidance.
        rows: a row for each model and setting.
        seconds: time of everything, loading included.
    """

    page: Path
    steps: int
    guidance: float
    rows: tuple[ShownRow, ...]
    seconds: float


def show(settings: DemoSettings) -> Shown:
    """Sample the shipped models in all settings, and write a report.

    Raises:
        CheckpointError: this installation lacks one of the models.
        RecipeError: a setting does not fit the report, or there is no guidance for Lite-CFG to act on.
        OutputError: the page cannot be written.
    """
    began = time.perf_counter()
    for name in (DIT, DCDIT):
        folder, _ = locate(name, local=True)
    chosen = json_object(folder / "tokdyn.json").get("sampling", {})
    steps = settings.sampling_steps or chosen.get("steps", 25)
    guidance = chosen.get("guidance", 2.0) if settings.guidance is None else settings.guidance
    if guidance == 1.0:
        raise RecipeError("guidance=1 turns guidance off, and Lite-CFG acts on guidance alone: give another guidance.")
    try:
        config = ReportConfig(
            out=settings.place,
            count=settings.count,
            seed=settings.seed,
            steps=steps,
            guidance=guidance,
            tail_drop=DROPS,
        )
    except ValidationError as error:
        raise explain(ReportConfig, error, "the settings of the report") from error
    budgets = [Setting(drop, lite) for lite in (None, LITE) for drop in DROPS]
    stacks = [Setting(), *(Setting(methods=methods) for methods in STACKS)]
    names = (DCDIT, DIT)
    runs = gather(config, names, {DCDIT: budgets, DIT: stacks})
    page = build(config, runs, names).write(config.out)
    rows = [_row(run, budget) for run in runs for budget in sampled_of(run).budgets]
    return Shown(page, steps, guidance, tuple(rows), time.perf_counter() - began)


def _row(run: Run, budget: Budget) -> ShownRow:
    """Return the row of a budget."""
    sampled = sampled_of(run)
    cells = sampled.job.model.pos_embed.shape[1]
    whole = "every token" if sampled.maps is None and not budget.setting.methods else budget.name
    return ShownRow(
        model=run.folder.model,
        setting=whole,
        tokens=cells if budget.kept is None else cells * budget.kept,
        cells=cells,
        gflops=budget.gflops,
        milliseconds=budget.milliseconds,
        psnr=budget.psnr,
    )
