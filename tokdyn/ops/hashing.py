"""Random-looking numbers that depend on nothing but their arguments."""

from __future__ import annotations

from torch import Tensor

_MASK = 0xFFFFFFFF


def mix(number: Tensor) -> Tensor:
    """32 well-mixed bits of an int64 number (Wang's multiply-xorshift, with 32-bit arithmetic)."""
    number = number & _MASK
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        number = ((number ^ (number >> shift)) * factor) & _MASK
    return number ^ (number >> 16)
