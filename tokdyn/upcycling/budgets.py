"""Measure what a student costs, and how far its predictions are from the original's, at each of its budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokdyn.attach import set_tail_drop
from tokdyn.cost import flops
from tokdyn.recorder import evaluating
from tokdyn.upcycling.students import keeping_tail_drop, mean_errors


@dataclass(frozen=True)
class Budget:
    """A tail drop of a student.

    Attributes:
        tail_drop: Share of the kept tokens that is dropped; None is what the methods say.
        gflops_per_image: 1e9 FLOPs of a call, per image; a multiply-add is 2 FLOPs.
        error: Mean squared error of its predictions over the variance of the original's.
    """

    tail_drop: float | None
    gflops_per_image: float
    error: float


def measure_budgets(
    student: nn.Module,
    calls: Sequence[Mapping[str, Any]],
    drops: Sequence[float | None],
    teacher: nn.Module | None = None,
) -> list[Budget]:
    """Measure a student at some tail drops.

    Args:
        student: The wrapped transformer.
        calls: Arguments of the calls that errors are averaged over; the first one is counted.
        drops: The tail drops; None leaves it to the methods.
        teacher: The original; None is the student with its methods and its LoRA disabled.
    """
    costs = []
    with evaluating(student), keeping_tail_drop(student):
        for drop in drops:
            if drop is not None:
                set_tail_drop(student, drop)
            costs.append(flops(student, **calls[0]).per_image / 1e9)
    errors = mean_errors(student, calls, drops, teacher)
    return [Budget(*each) for each in zip(drops, costs, errors, strict=True)]
