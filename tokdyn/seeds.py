"""Derive the seed of every random draw from (seed, purpose, step, place), so that checkpoints hold no random state."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

SPLITMIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""The constants of SplitMix64 (Steele, Lea and Flood 2014): what is added to the state, and its two factors."""
_MASK = (1 << 64) - 1
_STEP, _FIRST, _SECOND = map(np.uint64, SPLITMIX)
_LOW = 2**32 - 1
_SPREAD = 0x9E3779B1  # odd, so that different high halves of a seed stay different


class Stream(IntEnum):
    """The purpose of a draw, so that draws for two purposes never share a seed."""

    WEIGHTS = 0
    MICRO_STEP = 1
    BUDGET = 2
    CALIBRATION = 3
    PREVIEW = 4
    IMAGE = 5


class Draw(IntEnum):
    """What is drawn for an image in a training step. Draws of different kinds are independent."""

    NOISE = 0
    TIMESTEP = 1
    LABEL = 2
    TAIL_DROP = 3
    PLAN = 4
    ROUTER = 5
    METHOD = 6


def _scramble(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply one step of SplitMix64 to each element.

    It is written out in integer arithmetic, so that draws are the same on all machines and library versions.
    """
    state = state + _STEP
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))


def mixed(seed: int, *parts: ArrayLike) -> NDArray[np.uint64]:
    """Hash integers into 64 random bits for every key (seed, *parts). Their order matters.

    Args:
        seed: any integer.
        *parts: integers or arrays of them, broadcast against each other.

    Returns:
        uint64 array of the broadcast shape, at least one-dimensional.
    """
    state = _scramble(np.array([seed & _MASK], dtype=np.uint64))
    for part in parts:
        bits = np.uint64(part & _MASK) if isinstance(part, int) else np.asarray(part).astype(np.uint64)
        state = _scramble(state ^ bits)
    return state


def mix(seed: int, *parts: int) -> int:
    """Hash integers into one 64-bit seed, as `mixed` does. Their order matters."""
    return int(mixed(seed, *parts)[0])


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


def low_seed(seed: int) -> int:
    """Fold a seed into its low 32 bits, which are all that a CPU generator reads; smaller seeds stay as they are."""
    return (seed & _LOW) ^ ((seed >> 32) * _SPREAD & _LOW)


def noise_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the generator of an image's noise, which a seed below 2**32 seeds as it is, as users of diffusers do."""
    return torch.Generator(device).manual_seed(low_seed(seed) if torch.device(device).type == "cpu" else seed)


def image_keys(seed: int, step: int, first: int, count: int) -> Tensor:
    """Return the keys from which `tokdyn.draws` draws all that is random about images of a training step.

    Args:
        seed: the seed of the recipe.
        step: steps already taken.
        first: place of the first image in the batch of the step.
        count: number of images, which have consecutive places.

    Returns:
        (count,) int64 on the CPU.
    """
    return torch.from_numpy(mixed(seed, Stream.IMAGE, step, np.arange(first, first + count)).view(np.int64))
