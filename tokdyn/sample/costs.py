"""Compute what each step of a sampling job cost: kept tokens, FLOPs and time, as means over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from tokdyn.attach import attachment_of
from tokdyn.cost import StepStats, flops_per_image, model_parts, stats
from tokdyn.cost.blocks import PARTS
from tokdyn.diffusion.records import StepRecord

CHUNKING = ("router", "residual", "dechunk")
"""Parts of a DC-DiT that a cached step skips."""
_AVERAGED = ("kept", "uncond_kept", "gflops", "milliseconds")


class StepCost(BaseModel):
    """Cost of one step, mean over images.

    Attributes:
        timestep: timestep given to the model.
        level: noise level in [0, 1].
        kept: kept share in the conditional branch; for a wrapped model, the smallest share that a block computed. None
            if every token was computed, or if no block ran.
        uncond_kept: kept share in the unconditional branch; None as for `kept`, and without guidance.
        gflops: 1e9 FLOPs per image, both branches and methods included; a multiply-add is 2 FLOPs. None if the model is
            wrapped and made more calls than `tokdyn.stats` keeps.
        milliseconds: time per image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    timestep: float
    level: float
    kept: float | None
    uncond_kept: float | None
    gflops: float | None
    milliseconds: float


@dataclass(frozen=True)
class Batch:
    """What is known of a batch that a process has sampled.

    Attributes:
        images: number of images.
        costs: cost of each step, mean over the images.
        records: the records of the steps; empty unless they are drawn.
    """

    images: int
    costs: tuple[StepCost, ...]
    records: tuple[StepRecord, ...]

    @property
    def seconds(self) -> float:
        """Time in the model and the scheduler."""
        return sum(cost.milliseconds for cost in self.costs) * self.images / 1e3


def step_costs(model: Any, records: Sequence[StepRecord], images: int) -> tuple[StepCost, ...]:
    """Return the cost of each step of one batch, mean over its images.

    Args:
        model: model that was sampled; if it is wrapped, its `tokdyn.stats` must still be those of this batch.
        records: what was recorded in each step of the batch.
        images: B, the number of images in the batch.
    """
    if attachment_of(model) is None:
        return tuple(_step_cost(model, record, images) for record in records)
    steps: tuple[StepStats | None, ...] = stats(model).steps
    if len(steps) != len(records):  # there were more calls than tokdyn.stats keeps
        steps = (None,) * len(records)
    return tuple(_wrapped_step_cost(model, record, images, step) for record, step in zip(records, steps, strict=True))


def merge_costs(
    earlier: Sequence[StepCost], before: int, later: Sequence[StepCost], after: int
) -> tuple[StepCost, ...]:
    """Average the costs of two sets of images that were sampled with the same steps.

    Args:
        earlier: mean cost of each step over the first set, or empty.
        before: number of images in the first set.
        later: mean cost of each step over the second set, or empty.
        after: number of images in the second set.

    Returns:
        The means over both sets, each None if one of the two is; the costs of one set if the other is empty.
    """
    if not earlier or not later:
        return tuple(earlier or later)
    share = after / (before + after)

    def mean(one: float | None, other: float | None) -> float | None:
        return None if one is None or other is None else one + share * (other - one)

    means = [
        {name: mean(getattr(one, name), getattr(other, name)) for name in _AVERAGED}
        for one, other in zip(earlier, later, strict=True)
    ]
    return tuple(cost.model_copy(update=update) for cost, update in zip(earlier, means, strict=True))


def mean_kept(steps: Sequence[StepCost]) -> float | None:
    """Return the mean kept share over steps, images and branches; None if no step has one."""
    shares = [share for step in steps for share in (step.kept, step.uncond_kept) if share is not None]
    return sum(shares) / len(shares) if shares else None


def _step_cost(model: Any, record: StepRecord, images: int) -> StepCost:
    """Return the cost of a step of a model that is not wrapped."""
    counts = record.counts
    branches: list[Tensor] = []
    if counts is not None:
        branches = [counts.cond] if counts.uncond is None else [counts.cond, counts.uncond]
    if branches:
        # Attention grows with the square of an image's tokens, so the mean over images is not the cost of the mean.
        flops = sum(sum(model_parts(model, branch.tolist()).values()) for branch in branches) / images
    else:
        flops = flops_per_image(model, None, 1.0 if record.guided else None)
    return _cost(record, images, [float(b.double().mean()) / counts.tokens for b in branches] if counts else [], flops)


def _wrapped_step_cost(model: Any, record: StepRecord, images: int, step: StepStats | None) -> StepCost:
    """Return the cost of a step of a wrapped model.

    The FLOPs of blocks and methods come from its statistics, those of the other parts from the model's configuration.
    """
    if step is None:
        return _cost(record, images, [], None)
    outside = {name: flops for name, flops in model_parts(model).items() if name not in PARTS}
    skipped = sum(flops for name, flops in outside.items() if name in CHUNKING)
    flops = sum((call.flops or 0) + call.samples * sum(outside.values()) - call.reused * skipped for call in step.calls)
    least = [count for call in step.calls for count in call.kept]
    cells = step.calls[0].cells
    halves = [least[:images], least[images:]] if record.guided else [least]
    shares = [_share(half, cells) for half in halves]
    return _cost(record, images, shares if any(share != 1.0 for share in shares) else [], flops / images)


def _share(kept: Sequence[int | None], cells: int) -> float | None:
    """Return the mean kept share from the kept tokens of each image; None stands for an image that was not computed."""
    computed = [count for count in kept if count is not None]
    return sum(computed) / (cells * len(computed)) if computed else None


def _cost(record: StepRecord, images: int, shares: Sequence[float | None], flops: float | None) -> StepCost:
    """Return a cost from the kept share of each branch (empty if all tokens were computed) and the FLOPs per image."""
    return StepCost(
        timestep=record.timestep,
        level=record.level,
        kept=shares[0] if shares else None,
        uncond_kept=shares[1] if len(shares) > 1 else None,
        gflops=None if flops is None else flops / 1e9,
        milliseconds=1e3 * record.seconds / images,
    )
