"""Draw the noise of each image from its own seed, so that an image does not depend on its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokdyn.seeds import low_seed, noise_generator

_STEP_STREAM = 0x9E3779B97F4A7C15  # keeps the step noise of a seed apart from its initial noise
_SEED_RANGE = 2**63


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal noise for each image from its own seed, on the CPU so that it is equal for every device.

    Args:
        seeds: B seeds.
        shape: shape of one image.

    Returns:
        (B, *shape) float32 on the CPU.
    """
    return torch.stack([torch.randn(shape, generator=noise_generator(seed)) for seed in seeds])


def step_generators(seeds: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """Make one generator per image for the noise that a stochastic scheduler adds in each step.

    The generators are on the model's device, because copying noise from the host would synchronise at every step. An
    image from a stochastic scheduler therefore depends on the type of device; one from a deterministic scheduler does
    not.
    """
    bases = [low_seed(seed) for seed in seeds] if device.type == "cpu" else seeds
    return [torch.Generator(device).manual_seed((seed + _STEP_STREAM) % _SEED_RANGE) for seed in bases]
