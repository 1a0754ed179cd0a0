"""Derive the seed of every random draw from (seed, purpose, step, slot), so that checkpoints hold no random state."""

from __future__ import annotations

from enum import IntEnum

import torch

_MASK = (1 << 64) - 1


class Stream(IntEnum):
    """The purpose of a draw, so that draws for two purposes never share a seed."""

    WEIGHTS = 0
    MICRO_STEP = 1
    BUDGET = 2
    CALIBRATION = 3
    PREVIEW = 4
    PLAN = 5


def splitmix64(value: int) -> int:
    """Hash a 64-bit integer to another one (one step of SplitMix64, Steele, Lea and Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mix(seed: int, *parts: int) -> int:
    """Hash integers into one 64-bit seed. Their order matters."""
    state = splitmix64(seed & _MASK)
    for part in parts:
        state = splitmix64(state ^ (part & _MASK))
    return state


def seed_everything(seed: int, stream: Stream, *parts: int) -> None:
    """Seed torch's global generators, on CPU and accelerators, for one purpose.

    Args:
        seed: the seed of the recipe.
        stream: the purpose.
        *parts: the place in the run: step and slot. A slot is the number of a micro-batch, counted over all devices of
            a step, so that two devices draw the same as one device with two micro-batches.
    """
    torch.manual_seed(mix(seed, stream, *parts) >> 1)  # torch wants a value below 2**63


def generator(seed: int, stream: Stream, *parts: int) -> torch.Generator:
    """Return a new CPU generator, seeded as in `seed_everything`; the global generators stay as they are."""
    return torch.Generator().manual_seed(mix(seed, stream, *parts) >> 1)
