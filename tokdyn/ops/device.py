"""What is cheap on which device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_TRANSFORMED: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
_CPU: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
_CPU_HALVES = {
    torch.bfloat16: any(_CPU.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")),
    torch.float16: bool(_CPU.get("amx_fp16")),
}


def asking_waits(x: Tensor) -> bool:
    """Whether reading a value of this tensor makes the host wait for a queue of work, as on every accelerator.

    While a graph is being compiled there are no values to read, which comes to the same.
    """
    return x.device.type != "cpu" or torch.compiler.is_compiling()


def by_hand(x: Tensor) -> bool:
    """Whether our own forms of an operation may run: on CPU, outside of graphs, traces and transforms of torch.func."""
    return not asking_waits(x) and not _TRANSFORMED() and torch._C._get_tracing_state() is None


def cpu_multiplies(dtype: torch.dtype) -> bool:
    """Whether this processor has instructions for products of that type."""
    return bool(_CPU_HALVES.get(dtype, True))


def halves_multiply_slowly(x: Tensor) -> bool:
    """Whether matrix products are faster in fp32: half precision on a CPU that has no instructions for it."""
    return x.device.type == "cpu" and not cpu_multiplies(x.dtype)


def autocast_is_slow(x: Tensor) -> bool:
    """Whether autocast is on and asks for a type in which `halves_multiply_slowly`."""
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    return not cpu_multiplies(torch.get_autocast_dtype("cpu"))
