"""Decide when a cached output of the blocks may be reused.

Source: TeaCache (arXiv 2411.19108). The relative change of the modulated input goes through a polynomial and is summed
over steps; when the sum reaches a threshold, the blocks are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tokdyn.errors import InputError


def relative_change(now: Tensor, before: Tensor, total: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Compute `|now - before|_1 / |before|_1` for each sample.

    Args:
        now: (B, ...).
        before: the shape of now, from an earlier step.
        total: adds sums (2, B) up over the processes that have parts of the samples; None if this one has all.

    Returns:
        (B,) fp32; 0 where both are zero, infinity where only `before` is.
    """
    difference = (now.float() - before.float()).abs_().flatten(1).sum(1)
    length = before.abs().flatten(1).sum(1, dtype=torch.float32)
    if total is not None:
        difference, length = total(torch.stack([difference, length]))
    return torch.where(difference == 0, 0.0, difference / length)


def rescale(change: Tensor, coefficients: Sequence[float]) -> Tensor:
    """Evaluate the rescaling polynomial at a change, and clamp it to zero from below.

    Args:
        change: (B,).
        coefficients: highest degree first, as published for TeaCache; (1, 0) is the identity.
    """
    out = torch.zeros_like(change)
    for coefficient in coefficients:
        out = out * change + coefficient
    return out.clamp(min=0)


def accumulate(total: Tensor, change: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Decide which samples reuse their last output, and update what they have accumulated.

    Args:
        total: (B,) change accumulated since the last computed step.
        change: (B,) rescaled change of this step.
        threshold: reuse below it; 0 or less never reuses, infinity always.

    Returns:
        (B,) bool, and the new (B,) total, which is 0 where the blocks are computed. NaN is computed.
    """
    total = total + change
    reuse = (total < threshold) & torch.full_like(total, threshold > 0, dtype=torch.bool)
    return reuse, torch.where(reuse, total, 0.0)


def fit_rescaling(changes: Tensor, effects: Tensor, degree: int = 4) -> tuple[float, ...]:
    """Fit the polynomial that predicts how much the output changes from how much the input does, by least squares.

    Args:
        changes: (n,) relative changes of the modulated input.
        effects: (n,) relative changes of the blocks' output in the same steps.
        degree: of the polynomial; lowered if there are too few different changes.

    Returns:
        Coefficients, highest degree first.

    Raises:
        InputError: no step has finite changes.
    """
    x, y = changes.double().flatten(), effects.double().flatten()
    good = x.isfinite() & y.isfinite()
    x, y = x[good], y[good]
    if not len(x):
        raise InputError("no step has a finite change; a cache needs at least two different steps to be calibrated.")
    degree = min(degree, len(set(x.tolist())) - 1)
    scale = x.abs().max().clamp(min=torch.finfo(torch.float64).tiny)  # well-conditioned powers
    powers = torch.stack([(x / scale) ** k for k in range(degree, -1, -1)], dim=1)
    solution = torch.linalg.lstsq(powers, y[:, None], driver="gelsd").solution[:, 0]
    return tuple(float(c / scale ** (degree - k)) for k, c in enumerate(solution))
