"""Settings of the process and facts about its machine: memory settings on CPU, devices by name, a description."""

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
_LARGEST = 2**31 - 1  # the largest value that mallopt takes
_NEVER = -1  # turns trimming off; a threshold of 2 GB would be reached, and then every operation pays for fresh memory

# By default oneDNN, and torch's own layer above it, each keep 1024 kernels, one per shape, with scratch memory.
_KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


def settle_memory() -> None:
    """Call `keep_large_buffers` and `bound_kernel_caches`. To be called before the first tensor operation."""
    keep_large_buffers()
    bound_kernel_caches()


def keep_large_buffers() -> bool:
    """Ask glibc to reuse buffers over 32 MB instead of returning them to the system on every operation.

    On CPU, the page faults of fresh memory take up to half the time of large tensor operations. It may be called at any
    time, and has no effect if the C library is not glibc.

    Returns:
        Whether the allocator accepted the settings.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # older versions refuse thresholds over 32 MB, but can be told not to use mmap at all
    reuses = mallopt(_M_MMAP_THRESHOLD, _LARGEST) or mallopt(_M_MMAP_MAX, 0)
    return bool(reuses) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def bound_kernel_caches() -> None:
    """Limit how many compiled CPU kernels are kept, so that batches of changing shapes do not fill the memory.

    In a chunking model the number of kept tokens differs from step to step, so that bfloat16 kernels for new shapes are
    compiled all the time. With the default capacity, 64 images of 256 tokens at width 192 let the process grow by 20 MB
    a step, to 8 GB; with this one it stays below 2 GB at the same speed.

    This sets environment variables that are not set yet, and has an effect only before the first matrix product of the
    process.
    """
    for name, capacity in _KERNEL_CACHES.items():
        os.environ.setdefault(name, capacity)


def open_device(name: str) -> torch.device:
    """Return a device by name: "cpu", "cuda", "cuda:1" or "auto", which is a GPU if there is one and else the CPU.

    Raises:
        InputError: the machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device={name} cannot be used here: give {' or '.join(_choices())}.") from error
    return device


def _choices() -> list[str]:
    """Return the settings of devices that this machine has."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = ["auto", "cpu", *(["cuda"] if count else []), *(f"cuda:{index}" for index in range(1, count))]
    names += ["mps"] if torch.backends.mps.is_available() else []
    return [f"device={name}" for name in names]


def product_type(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the dtype of matrix products under autocast: bfloat16, or None for float32 without autocast.

    Args:
        precision: "bf16", "fp32" or "auto", which is bf16 on a GPU and fp32 elsewhere.
        device: the device that computes.
    """
    half = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else None


def describe(device: torch.device) -> dict[str, str | int]:
    """Describe the machine, for storing with measurements.

    Returns:
        "system", the operating system; "processor"; "cpus", the number of cores; "threads", the number of threads that
        torch uses; "accelerator", the name of the GPU, only if the device is one; "device"; and "torch", its version.
    """
    machine: dict[str, str | int] = {"system": platform.system(), "processor": processor()}
    machine |= {"cpus": os.cpu_count() or 1, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        machine["accelerator"] = torch.cuda.get_device_name(device)
    return machine | {"device": str(device), "torch": torch.__version__}


def memory() -> int | None:
    """Return the bytes of memory of the machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def free_memory(device: torch.device) -> float:
    """Return the free memory of a device in bytes, or infinity if it cannot be read."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    meminfo = Path("/proc/meminfo")
    if device.type == "cpu" and meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines())
        return float(lines["MemAvailable"].split()[0]) * 1024.0
    return float("inf")  # unknown


def processor() -> str:
    """Return the processor's model name on Linux; elsewhere, or if Linux does not give it, what Python reports."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
