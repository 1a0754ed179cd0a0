"""The process and its machine: memory settings on CPU, devices by name, and a description of the machine."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch

from tokdyn.errors import InputError

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_LARGEST = 2**31 - 1  # the largest int, which is what mallopt takes
_NEVER = -1  # a threshold of 2 GB would be reached, and every further operation would pay for fresh memory

# By default oneDNN, and torch's own layer above it, keep 1024 kernels each, one per shape, with scratch memory.
_KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


def settle_memory() -> None:
    """Apply both memory settings below; call it before the first tensor operation of long work."""
    keep_large_buffers()
    bound_kernel_caches()


def keep_large_buffers() -> bool:
    """Ask glibc to reuse buffers over 32 MB instead of returning them to the system on every operation.

    The page faults of fresh memory cost large tensor operations up to half their time on CPU. Safe at any time; does
    nothing where the C library is not glibc.

    Returns:
        Whether the allocator took the settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # Older versions refuse thresholds over 32 MB, but can be told to map nothing.
    reuses = mallopt(_M_MMAP_THRESHOLD, _LARGEST) or mallopt(_M_MMAP_MAX, 0)
    return bool(reuses) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def bound_kernel_caches() -> None:
    """Limit the number of compiled kernels that are kept, so that ragged batches do not fill the memory.

    The number of kept tokens differs from step to step, so a chunking model in bfloat16 needs new shapes all the time.
    With the default capacity, 64 images of 256 tokens at width 192 grow the process by 20 MB a step, to 8 GB; with this
    one they stay below 2 GB at the same speed. It takes effect before the first matrix product of the process only, and
    values that are set in the environment win.
    """
    for name, capacity in _KERNEL_CACHES.items():
        os.environ.setdefault(name, capacity)


def open_device(name: str) -> torch.device:
    """Return the device of that name; `auto` is a GPU if there is one.

    Raises:
        InputError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device={name} is not available: give device=cpu, device=cuda or device=auto.") from error
    return device


def product_type(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the type of matrix products: bfloat16 for `bf16` and for `auto` on a GPU, otherwise None for float32."""
    half = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else None


def describe(device: torch.device) -> dict[str, str | int]:
    """Describe the machine that numbers are measured on.

    Returns:
        Operating system, processor, number of cores and of threads in use, the accelerator if the device is one, the
        device, and the version of torch.
    """
    machine: dict[str, str | int] = {"system": platform.system(), "processor": _processor()}
    machine |= {"cpus": os.cpu_count() or 1, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        machine["accelerator"] = torch.cuda.get_device_name(device)
    return machine | {"device": str(device), "torch": torch.__version__}


def _processor() -> str:
    """Return the processor's model name where Linux gives it, otherwise what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
