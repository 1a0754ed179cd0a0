"""Which number types to compute in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokdyn.ops import torch_private
from tokdyn.ops.dispatch import is_fake

_CPU: Mapping[str, Any] = torch_private.cpu_capabilities() if torch_private.cpu_capabilities else {}
CPU_HALVES = {
    torch.bfloat16: any(_CPU.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")),
    torch.float16: bool(_CPU.get("amx_fp16")),
}
"""Whether this processor has instructions for matrix products in the half types."""


def exact(x: Tensor) -> Tensor:
    """Cast a tensor to fp32, unless it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the type that matrix products of x are computed in: that of autocast, which leaves fp64 alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


@contextmanager
def full_convolutions(device: torch.device) -> Iterator[None]:
    """Compute convolutions of fp32 tensors in fp32, where cuDNN would round them to TF32 by default.

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


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for matrix products in a type."""
    return bool(CPU_HALVES.get(dtype, True))


def halves_multiply_slowly(x: Tensor) -> bool:
    """Whether matrix products of x would be faster in fp32: on a CPU without instructions for its half type."""
    return x.device.type == "cpu" and not cpu_multiplies(x.dtype)


def autocast_is_slow(x: Tensor) -> bool:
    """Whether autocast is on and asks for a type that the CPU, where x is, has no instructions for.

    A tensor without values is computed by no processor, and stands for one on an accelerator.
    """
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or is_fake(x):
        return False
    return not cpu_multiplies(torch.get_autocast_dtype("cpu"))
