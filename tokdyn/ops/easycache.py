"""Predict how much the output of a model changes from how much its input does (EasyCache, arXiv 2507.02860).

In the stable part of a trajectory, the change of the output is proportional to that of the input. The rate is measured
between the last two computed steps.
"""

from __future__ import annotations

from torch import Tensor


def transformation_rate(output: Tensor, last_output: Tensor, x: Tensor, last_x: Tensor) -> Tensor:
    """Compute `mean |output - last_output| / mean |x - last_x|` for each sample.

    Args:
        output: (B, ...) what the model predicts in a computed step.
        last_output: (B, ...) what it predicted in the computed step before.
        x: (B, ...) the input of this step.
        last_x: (B, ...) the input of the computed step before.

    Returns:
        (B,) fp32; NaN where neither has changed.
    """
    return mean_change(output, last_output) / mean_change(x, last_x)


def predicted_change(rate: Tensor, x: Tensor, before: Tensor, output: Tensor) -> Tensor:
    """Predict the relative change of the output in a step, `rate * mean |x - before| / mean |output|`.

    Args:
        rate: (B,) the transformation rate.
        x: (B, ...) the input of this step.
        before: (B, ...) the input of the step before, computed or not.
        output: (B, ...) what the model predicted when each sample was last computed.

    Returns:
        (B,) fp32.
    """
    return rate * mean_change(x, before) / output.float().abs().flatten(1).mean(1)


def mean_change(now: Tensor, before: Tensor) -> Tensor:
    """Compute `mean |now - before|` for each sample, (B,) fp32, of two tensors (B, ...) of one shape."""
    return (now.float() - before.float()).abs().flatten(1).mean(1)
