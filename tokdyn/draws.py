"""Draw the random numbers of an image from its key, so that they depend neither on its batch nor on the device.

A key is 64 random bits, see `tokdyn.seeds.image_keys`. A number is a hash of a key, a purpose and an index, and all are
computed at once. Integers are the same on all machines; other numbers differ by the rounding of their functions.

`keys` are (B,) int64, and results are on their device. `purpose` is one or more integers: see `tokdyn.seeds.Draw`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokdyn.seeds import SPLITMIX

_STEP, _FIRST, _SECOND = (value - (value >> 63 << 64) for value in SPLITMIX)  # the same bits, as int64


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shift bits to the right and fill up with zeros; `>>` of int64 fills up with the sign."""
    return (bits >> places) & ((1 << 64 - places) - 1)


def _scramble(state: Tensor) -> Tensor:
    """Apply the step of SplitMix64 that `tokdyn.seeds.mixed` applies, with the same bits as result."""
    state = state + _STEP
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return state ^ _shifted(state, 31)


def bits(keys: Tensor, count: int, *purpose: int) -> Tensor:
    """Draw (B, count) times 64 random bits, as int64. A larger count only appends to a smaller one."""
    for part in purpose:
        keys = _scramble(keys ^ part)
    return _scramble(keys[:, None] ^ torch.arange(count, device=keys.device))


def integers(keys: Tensor, count: int, high: int, *purpose: int) -> Tensor:
    """Draw integers (B, count) from 0 to high - 1, of int64; high is at most 2**31."""
    return _shifted(bits(keys, count, *purpose), 32) * high >> 32


def uniform(keys: Tensor, count: int, *purpose: int) -> Tensor:
    """Draw uniform numbers (B, count) in [0, 1), of fp32: multiples of 2**-24."""
    return _shifted(bits(keys, count, *purpose), 40).float() * 2.0**-24


def normal(keys: Tensor, count: int, *purpose: int) -> Tensor:
    """Draw standard normal numbers (B, count), of fp32, by the method of Box and Muller.

    They are computed in fp64 where the device has it, so that after rounding to fp32 they are the same on all machines,
    but for one in some 10**8.
    """
    drawn = bits(keys, (count + 1) // 2, *purpose)
    dtype = torch.float32 if keys.device.type == "mps" else torch.float64
    radius = (_shifted(drawn, 32).to(dtype) + 0.5).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = (drawn & 0xFFFFFFFF).to(dtype).mul_(2.0**-32 * 2.0 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count].float()
