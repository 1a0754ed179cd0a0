"""What must not be computed in less than fp32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def exact(x: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is already."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def full_convolutions(device: torch.device) -> Iterator[None]:
    """Convolutions of fp32 tensors in fp32, where cuDNN would round them to TF32, as it does by default.

    Has no effect on code that torch.compile traces; set `torch.backends.cudnn.conv.fp32_precision = "ieee"` for that.
    """
    if device.type != "cuda" or torch.compiler.is_compiling():
        yield
        return
    convolution = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolution.fp32_precision
    convolution.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolution.fp32_precision = before
