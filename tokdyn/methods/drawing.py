"""What methods draw and average in training, so that no image depends on the others that are computed with it.

In a training run numbers are drawn from the keys of the images, and means are those of the step's whole batch
(`tokdyn.division`). In other training loops torch's generator draws, and means are those of the call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tokdyn.division import current
from tokdyn.ops.skipping import logistic


def uniform(samples: Sequence[int], count: int, device: torch.device, slot: int, *purpose: int) -> Tensor:
    """Draw uniform numbers in [0, 1) for each of some samples.

    Args:
        samples: b positions in the batch of the call.
        count: numbers for each of them; a larger count only appends to a smaller one.
        device: of the result.
        slot: slot of the handler that draws.
        *purpose: integers that tell its draws apart.

    Returns:
        (b, count) fp32.
    """
    if (part := current()) is None:
        return torch.rand(len(samples), count, device=device)
    return part.uniform(samples, count, slot, *purpose).to(device)


def gate_noise(
    training: bool, samples: Sequence[int], shape: Sequence[int], device: torch.device, slot: int, *purpose: int
) -> Tensor | None:
    """Draw the noise (b, *shape) of gates, differences of two Gumbel variables; None except in training.

    The other arguments are those of `uniform`.
    """
    if not training:
        return None
    drawn = uniform(samples, math.prod(shape), device, slot, *purpose)
    return logistic(drawn).view(-1, *shape)


def over_batch(name: str, values: Tensor) -> Tensor:
    """Shift values (B,) of all samples so that their mean is that of a training step's whole batch.

    Args:
        name: of the loss that the mean is for.
        values: (B,), whose gradients stay as they are.
    """
    part = current()
    return values if part is None else part.over_batch(name, values)
