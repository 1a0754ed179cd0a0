"""Hold the result of a sampling job, and write it as sample.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from tokdyn.files import replacing
from tokdyn.sample.config import SampleConfig
from tokdyn.sample.costs import Batch, StepCost, mean_kept, merge_costs


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class BudgetResult(_Frozen):
    """The result of sampling with one tail drop.

    Attributes:
        tail_drop: tail drop of the conditional branch.
        images: number of images that exist now.
        made: number of images that this job sampled.
        measured: number of images that `kept`, `tflops_per_image` and `steps` are means over. In a resumed folder,
            images of earlier jobs that sample.json lists are included; an image that was sampled twice counts twice.
        seconds: time that this job spent in the model and the scheduler; of several processes that sample at the same
            time, the slowest counts.
        images_per_second: images that this job sampled per second of that time; None if it sampled none.
        kept: mean kept share over steps, images and branches; None for a model that computes every token.
        tflops_per_image: 1e12 FLOPs of all steps and branches, methods included; a multiply-add is 2 FLOPs. None if
            they are not known for all steps.
        steps: cost of each step; empty if nothing was measured.
        files: files that were written.
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

    def with_batches(self, batches: Sequence[Batch]) -> BudgetResult:
        """Return a copy of this result to which the batches are added that several processes sampled at the same time.

        Args:
            batches: the batches, one or more; the slowest counts for the time that was spent.
        """
        steps, measured = self.steps, self.measured
        for batch in batches:
            steps = merge_costs(steps, measured, batch.costs, batch.images)
            measured += batch.images
        made = self.made + measured - self.measured
        gflops = [cost.gflops for cost in steps if cost.gflops is not None]
        seconds = self.seconds + max(batch.seconds for batch in batches)
        return BudgetResult(
            tail_drop=self.tail_drop,
            images=self.images + made - self.made,
            made=made,
            measured=measured,
            seconds=seconds,
            images_per_second=made / seconds,
            kept=mean_kept(steps),
            tflops_per_image=None if len(gflops) < len(steps) else sum(gflops) / 1e3,
            steps=steps,
            files=self.files,
        )


class SampleResult(_Frozen):
    """The result of one sampling job, as sample.json stores it.

    Attributes:
        settings: the settings as the user gave them.
        identity: see `tokdyn.sample.identity`; a folder is resumed only by a job with an equal identity. Empty unless
            the setting `format` is "folder".
        model: path, name, class, number of parameters and step of the model.
        used: the scheduler, clipping, precision and device that were used, and whether images are decoded latents.
        budgets: one entry per tail drop.
        files: pictures that compare the tail drops.
        seconds: wall time, loading and writing included.
        machine: machine that the job ran on.
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
        """Write the result as JSON, atomically; creates the folder if needed."""
        with replacing(path) as half:
            half.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
