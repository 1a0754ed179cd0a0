"""What a sampling run did, as sample.json keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from tokdyn.files import replacing
from tokdyn.sample.config import SampleConfig
from tokdyn.sample.costs import StepCost, joined, mean_kept


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BudgetResult(_Frozen):
    """The images of one tail drop.

    Attributes:
        tail_drop: of the conditional branch.
        images: how many there are now.
        made: how many of them this run made.
        measured: how many the costs below are means over. Those of a folder that was continued include the images of
            earlier runs, as far as sample.json knows of them; an image that was made twice counts twice.
        seconds: spent in the model and the scheduler by this run.
        images_per_second: made in those seconds.
        kept: mean share of tokens over steps, images and branches; None for a model that computes every token.
        tflops_per_image: 1e12 FLOPs, all steps and branches together, methods included; a multiply-add is 2 FLOPs.
            None where they are not known for all steps.
        steps: what each step cost; empty if nothing was measured.
        files: what was written.
    """

    tail_drop: float
    images: int = 0
    made: int = 0
    measured: int = 0
    seconds: float = 0.0
    images_per_second: float | None = None
    kept: float | None = None
    tflops_per_image: float | None = None
    steps: tuple[StepCost, ...] = ()
    files: tuple[Path, ...] = ()

    def with_batch(self, costs: Sequence[StepCost], images: int) -> BudgetResult:
        """The same after one more batch.

        Args:
            costs: what its steps cost, from `step_costs`.
            images: how many images it holds.
        """
        steps = joined(self.steps, self.measured, costs, images)
        known = [cost.gflops for cost in steps if cost.gflops is not None]
        seconds = self.seconds + sum(cost.milliseconds for cost in costs) * images / 1e3
        return BudgetResult(
            tail_drop=self.tail_drop,
            images=self.images + images,
            made=self.made + images,
            measured=self.measured + images,
            seconds=seconds,
            images_per_second=(self.made + images) / seconds,
            kept=mean_kept(steps),
            tflops_per_image=None if len(known) < len(steps) else sum(known) / 1e3,
            steps=steps,
            files=self.files,
        )


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
