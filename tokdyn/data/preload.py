"""Decode a set of images at once, so that training does not decode them again in every epoch."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tokdyn.errors import DataError
from tokdyn.progress import progress

_CHUNK = 64  # images that a thread decodes before it reports progress
_SLOW = 1e-3  # seconds per image above which threads pay off; below, they mostly wait for the interpreter's lock


def decode_all(
    read: Callable[[int], NDArray[np.uint8]], count: int, shape: tuple[int, int, int], title: str, stop: bool
) -> tuple[Tensor, dict[int, DataError]]:
    """Decode images into one tensor, on several threads if decoding is slow.

    Args:
        read: called with an index, returns the image (C, H, W) or raises a DataError.
        count: number of images (N).
        shape: (C, H, W).
        title: shown beside the progress bar.
        stop: stop soon after the first image that cannot be read.

    Returns:
        Images (N, C, H, W) uint8, and the errors of unreadable images by index, in ascending order. The pixels of
        unreadable images are undefined, and with `stop` those of later images too.
    """
    pixels = torch.empty(count, *shape, dtype=torch.uint8)
    view = pixels.numpy()

    def load(start: int) -> list[tuple[int, DataError]]:
        failures = []
        for index in range(start, min(start + _CHUNK, count)):
            try:
                view[index] = read(index)
            except DataError as error:
                failures.append((index, error))
        return failures

    began = time.perf_counter()
    broken = dict(load(0))
    slow = time.perf_counter() - began > _SLOW * min(_CHUNK, count)
    starts = range(_CHUNK, count, _CHUNK)
    with progress(title, count) as advance, ThreadPoolExecutor(os.cpu_count() if slow else 1) as pool:
        advance(min(_CHUNK, count))
        for start, failures in zip(starts, pool.map(load, starts), strict=True):
            if broken and stop:
                pool.shutdown(cancel_futures=True)
                break
            broken.update(failures)
            advance(min(_CHUNK, count - start))
    return pixels, broken
