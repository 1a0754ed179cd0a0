"""Derive every random draw from (seed, purpose, step, slot), so that a checkpoint needs no random state."""

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
    """Scramble a 64-bit integer (the finaliser of SplitMix64, Steele, Lea and Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def mix(seed: int, *parts: int) -> int:
    """Fold integers into one 64-bit seed; the order matters."""
    state = splitmix64(seed & _MASK)
    for part in parts:
        state = splitmix64(state ^ (part & _MASK))
    return state


def seed_everything(seed: int, stream: Stream, *parts: int) -> None:
    """Seed torch's global generators, on CPU and accelerators, for one purpose.

    Args:
        seed: The recipe's seed.
        stream: The purpose.
        parts: Where in the run: step and slot. The slot numbers the micro-batches of one step over all devices, so
            two devices draw what one device with two micro-batches draws.
    """
    torch.manual_seed(mix(seed, stream, *parts) >> 1)  # torch wants a value below 2**63


def generator(seed: int, stream: Stream, *parts: int) -> torch.Generator:
    """Return a CPU generator of its own for one purpose, leaving the global ones alone."""
    return torch.Generator().manual_seed(mix(seed, stream, *parts) >> 1)
