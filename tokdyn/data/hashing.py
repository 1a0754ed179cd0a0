"""Draw counter-based random numbers: a number depends only on its key, not on what was drawn before it.

A key is (seed, purpose, counters), mixed by `tokdyn.seeds.mixed`.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from tokdyn.seeds import mixed


class Purpose(IntEnum):
    """The purpose of a random number. Numbers for different purposes are independent."""

    SHAPE = 1
    ORDER = 2
    FLIP = 3
    POSTERIOR = 4
    HELD_OUT = 5


def hashed(seed: int, purpose: Purpose, *counters: ArrayLike) -> NDArray[np.uint64]:
    """Return 64 random bits for every key (seed, purpose, *counters).

    Args:
        seed: any integer.
        purpose: the purpose of the bits.
        *counters: non-negative integers or arrays of them, broadcast against each other.

    Returns:
        uint64 array of the broadcast shape, at least one-dimensional.
    """
    return mixed(seed, int(purpose), *counters)


def uniform(seed: int, purpose: Purpose, *counters: ArrayLike) -> NDArray[np.float64]:
    """Return one uniform number in [0, 1) for every key; arguments as in `hashed`."""
    return (hashed(seed, purpose, *counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def generators(seed: int, purpose: Purpose, *counters: ArrayLike) -> list[torch.Generator]:
    """Return one torch generator on the CPU for every key; arguments as in `hashed`.

    A CPU generator reads only the low 32 bits of its seed, so the parts of a key are mixed, not put side by side.
    """
    bits = hashed(seed, purpose, *counters) >> np.uint64(1)  # torch takes seeds below 2**63
    return [torch.Generator().manual_seed(value) for value in bits.tolist()]


def permutation(seed: int, epoch: int, length: int) -> NDArray[np.int64]:
    """Return the order of the samples in an epoch, a permutation of range(length) that the arguments alone decide."""
    keys = hashed(seed, Purpose.ORDER, epoch, np.arange(length, dtype=np.uint64))
    return np.argsort(keys, kind="stable").astype(np.int64)
