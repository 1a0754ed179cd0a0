"""Decide from the lengths of the blocks' effects whether an earlier effect still serves (MagCache, arXiv 2506.09045).

The length of the effect, divided by that in the step before, follows one curve for all prompts. How far the product of
these ratios since the last computed step is from 1 is the error of the effect that is used again.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def ratio_at(ratios: Sequence[float], step: int, steps: int) -> float:
    """Return the ratio of a step in a trajectory of another length: that of the nearest step, as the authors resample.

    Args:
        ratios: one for each step of the calibrated trajectory.
        step: from 0 to `steps` - 1.
        steps: number of steps of the trajectory.
    """
    return ratios[-1] if steps == 1 else ratios[round(step * ((len(ratios) - 1) / (steps - 1)))]


def drift(product: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the error of the effect of the last computed step, `|1 - product of the ratios since then|`.

    Args:
        product: (B,) product of the ratios of the steps since the last computed one, without this step; 1 if none.
        ratio: (B,) ratio of this step.

    Returns:
        (B,) the error of this step, which is to be accumulated, and (B,) the product with this step.
    """
    product = product * ratio
    return (1.0 - product).abs(), product
