"""Matching the compute of two training runs."""

from __future__ import annotations

from collections.abc import Sequence

from tokdyn.errors import InputError


def compute_matched_steps(steps: int, warmup: int, baseline: float, full: float, budgets: Sequence[float]) -> int:
    """Steps that cost as much as `steps` of a baseline: S_w + (S F_b - S_w F_0) / mean F (arXiv 2603.06351 v2).

    Args:
        steps: S, steps of the baseline.
        warmup: S_w, the first steps of the new model, which run without tail drop.
        baseline: F_b, FLOPs per image of the baseline (multiply-add = 2; any unit, the same for all).
        full: F_0, FLOPs per image without tail drop.
        budgets: FLOPs per image at each tail drop that training draws from, with equal chances.

    Returns:
        Steps, rounded to the nearest.

    Raises:
        InputError: a cost is not positive, or the warm-up alone exceeds the baseline's compute.
    """
    costs = [baseline, full, *budgets]
    if len(costs) < 3 or min(costs) <= 0:
        raise InputError(f"the FLOPs per image are {costs}, expected positive numbers and at least one budget.")
    left = steps * baseline - warmup * full
    if left < 0:
        raise InputError(
            f"{warmup} warm-up steps at {full:.3g} FLOPs cost more than {steps} baseline steps at {baseline:.3g}; "
            "use fewer warm-up steps."
        )
    return round(warmup + left * len(budgets) / sum(budgets))
