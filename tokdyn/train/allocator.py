"""Memory on CPU: keep large buffers in the process, and bound the caches of compiled kernels."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD = -1  # malloc.h
_M_MMAP_THRESHOLD = -3
_M_MMAP_MAX = -4
_LARGEST = 2**31 - 1  # mallopt takes an int

# oneDNN, and torch's own layer above it, keep 1024 kernels each, one per shape, with their scratch memory.
_KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}


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
    return bool(reuses) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST))


def bound_kernel_caches() -> None:
    """Keep few compiled kernels, so that ragged batches do not fill the memory.

    The number of kept tokens differs from step to step, so a chunking model in bfloat16 asks for new shapes all the
    time: 64 images of 256 tokens at width 192 grow the process by 20 MB a step, to 8 GB, with the default capacity,
    and stay below 2 GB, equally fast, with this one. Takes effect if called before the first matrix product of the
    process; values that are set in the environment win.
    """
    for name, capacity in _KERNEL_CACHES.items():
        os.environ.setdefault(name, capacity)
