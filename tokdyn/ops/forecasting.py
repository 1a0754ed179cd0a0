"""Forecast the effect of the blocks from the steps in which it was computed.

Every forecast is a weighted sum of computed effects. The weights depend on noise levels alone: those of the computed
steps and the one of the forecast. Samples of a batch may have computed other steps, or fewer, than their neighbours.

Sources: TaylorSeer (arXiv 2503.06923) for the forecasts of order 0, 1 and 2; Spectrum (arXiv 2603.01623) for Chebyshev
polynomials. Both papers count in steps; here the noise level takes their place, in which the effect is as smooth when a
sampler spaces its steps unequally.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEGREE = 4
"""Degree of the Chebyshev polynomials, M in Spectrum."""
RIDGE = 0.1
"""Strength of the regularisation, lambda in Spectrum."""


def taylor_weights(levels: Tensor, level: Tensor, order: int) -> Tensor:
    """Weigh the last `order + 1` computed effects as a Taylor expansion at the last one does (TaylorSeer).

    The forecast at a distance h of the last computed step is the sum over i of `h^i F[0, ..., i]`, where `F[0, ..., i]`
    is the divided difference of the last i + 1 effects. Where steps are N apart, it is the i-th difference over
    `i! N^i`, as in arXiv 2503.06923; divided differences are right at unequal distances as well.

    Order 1 is the straight line through two effects. Order 2 adds a curvature and keeps the slope of order 1 at the
    last step, as in the paper; the parabola through three effects would have another slope there, and follow errors
    of the effects more (docs/methods/feature-cache.md compares both).

    Args:
        levels: (B, K) fp64 noise levels of the computed steps of each sample, the last one first and all different; NaN
            where fewer than K are remembered.
        level: (B,) noise levels to forecast at.
        order: 0 repeats the last effect. With fewer than `order + 1` computed steps, the order is what they allow.

    Returns:
        (B, K) weights of the effects; those of a sample add up to 1.
    """
    weights = torch.zeros_like(levels)
    distance = level - levels[:, 0]
    for degree in range(min(order + 1, levels.shape[1])):
        nodes = levels[:, : degree + 1]
        gaps = nodes[:, :, None] - nodes[:, None, :] + torch.eye(degree + 1, dtype=levels.dtype)
        term = distance[:, None] ** degree / gaps.prod(2)
        weights[:, : degree + 1] += torch.where(nodes[:, -1:].isfinite(), term, 0.0)
    return weights


def chebyshev_weights(levels: Tensor, level: Tensor, degree: int = DEGREE, ridge: float = RIDGE) -> Tensor:
    """Weigh all remembered effects so that their sum is a least-squares fit of Chebyshev polynomials.

    With `Phi` the polynomials T_0 to T_degree at the computed levels, which are mapped from [0, 1] to [-1, 1], and
    `phi` those at the forecast, the weights are `Phi (Phi^T Phi + ridge I)^-1 phi` (Spectrum, arXiv 2603.01623).

    Args:
        levels: as in `taylor_weights`.
        level: (B,) noise levels to forecast at.
        degree: of the polynomials.
        ridge: strength of the regularisation, which draws the fit towards zero.

    Returns:
        (B, K) weights of the effects. A sample with fewer than `degree + 1` computed steps gets those of
        `taylor_weights` of order 1.
    """
    known = levels.isfinite()
    basis = torch.where(known[:, :, None], chebyshev(2 * levels - 1, degree), 0.0)
    normal = basis.transpose(1, 2) @ basis + ridge * torch.eye(degree + 1, dtype=levels.dtype)
    solution = torch.linalg.solve(normal, chebyshev(2 * level - 1, degree)[:, :, None])
    few = known.sum(1, keepdim=True) <= degree
    return torch.where(few, taylor_weights(levels, level, 1), (basis @ solution)[:, :, 0])


def chebyshev(x: Tensor, degree: int) -> Tensor:
    """Evaluate the Chebyshev polynomials of the first kind T_0 to T_degree; returns (..., degree + 1)."""
    values = [torch.ones_like(x), x]
    for _ in range(degree - 1):
        values.append(2 * x * values[-1] - values[-2])
    return torch.stack(values[: degree + 1], dim=-1)
