"""Randomness per image: the seed of an image alone decides its noise, whatever batch it is in."""

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
    """Make one generator per image for the noise of the steps.

    They live on the model's device, because a copy from the host would make the host wait at every step. An image drawn
    by a stochastic scheduler therefore depends on the kind of device; one drawn by a deterministic scheduler does not.
    """
    bases = [low_seed(seed) for seed in seeds] if device.type == "cpu" else seeds
    return [torch.Generator(device).manual_seed((seed + _STEP_STREAM) % _SEED_RANGE) for seed in bases]
