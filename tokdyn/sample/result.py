"""What a sampling run did and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from tokdyn.diffusion.records import StepRecord
from tokdyn.files import replacing
from tokdyn.flops import flops_per_image
from tokdyn.report.trajectory import Trajectory
from tokdyn.sample.config import SampleConfig


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StepCost(_Frozen):
    """One step, mean over all images that were made.

    Attributes:
        timestep: what the model was told.
        level: noise level in [0, 1].
        kept: share of the tokens kept in the conditional branch; None for a model that computes every token.
        uncond_kept: the same for the unconditional branch; None where it was not computed.
        gflops: 1e9 FLOPs per image, both branches together; a multiply-add is 2 FLOPs.
        milliseconds: per image.
    """

    timestep: float
    level: float
    kept: float | None
    uncond_kept: float | None
    gflops: float
    milliseconds: float


class BudgetResult(_Frozen):
    """The images of one tail drop.

    Attributes:
        tail_drop: of the conditional branch.
        images: how many there are now.
        made: how many of them this run made.
        seconds: spent in the model and the scheduler.
        images_per_second: made in those seconds.
        kept: mean share of tokens over steps, images and branches; None for a model that computes every token.
        tflops_per_image: 1e12 FLOPs, all steps and branches together; a multiply-add is 2 FLOPs.
        steps: what each step cost; empty if every image was there already.
        files: what was written.
    """

    tail_drop: float
    images: int
    made: int
    seconds: float
    images_per_second: float | None
    kept: float | None
    tflops_per_image: float | None
    steps: tuple[StepCost, ...]
    files: tuple[Path, ...]


class SampleResult(_Frozen):
    """One sampling run, as sample.json keeps it.

    Attributes:
        settings: what was asked for.
        identity: what decides the images; a folder is continued only if it is the same.
        model: path, name, class, parameters and step of the model.
        used: scheduler, clipping, precision and device in force.
        budgets: one entry per tail drop.
        files: pictures of all budgets together.
        seconds: wall time, loading and writing included.
        machine: what it ran on.
    """

    settings: SampleConfig
    identity: dict[str, Any]
    model: dict[str, Any]
    used: dict[str, Any]
    budgets: tuple[BudgetResult, ...]
    files: tuple[Path, ...]
    seconds: float
    machine: dict[str, str | int]

    def save(self, path: Path) -> None:
        """Write the JSON, making the folder if need be."""
        with replacing(path) as half:
            half.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def step_costs(model: Any, records: Sequence[StepRecord], run: Trajectory) -> tuple[StepCost, ...]:
    """Means over images of what each step cost.

    Args:
        model: for its FLOPs.
        records: the steps of any batch, for timesteps and guidance.
        run: the joined records of all batches.
    """
    costs = []
    for index, record in enumerate(records):
        kept = None if run.cond is None else float(run.cond[index].mean())
        uncond = None if run.uncond is None or not record.guided else float(run.uncond[index].mean())
        second = (1.0 if uncond is None else uncond) if record.guided else None
        costs.append(
            StepCost(
                timestep=record.timestep,
                level=record.level,
                kept=kept,
                uncond_kept=uncond,
                gflops=flops_per_image(model, kept, second) / 1e9,
                milliseconds=float(run.milliseconds[index]),
            )
        )
    return tuple(costs)


def mean_kept(run: Trajectory) -> float | None:
    """Share of the tokens kept, over steps, images and branches."""
    if run.cond is None:
        return None
    both = run.cond if run.uncond is None else np.concatenate([run.cond.ravel(), run.uncond.ravel()])
    return float(np.nanmean(both))
