"""The interface of a data set: labelled tensors by index, one at a time or in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tokdyn.errors import DataError


class Dataset(torch.utils.data.Dataset[tuple[Tensor, int]], ABC):
    """Labelled images or latents of one size.

    Attributes:
        shape: (C, H, W) of every sample.
        class_names: one name per label.
        can_flip: whether mirrored samples are available.
    """

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    can_flip: bool = True

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return len(self.class_names)

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples in one epoch."""

    @abstractmethod
    def fetch(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> tuple[Tensor, Tensor, list[int]]:
        """Read samples and report which ones were read.

        Args:
            indices: B sample numbers.
            flips: B booleans, True where the sample is to be mirrored left to right; None for no flips.

        Returns:
            Samples (B, C, H, W) float32, labels (B,) int64, and the B numbers of the samples that were read. They
            differ from `indices` only where an unreadable sample was replaced by another one.
        """

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """Describe the content in plain JSON values: equal descriptions mean equal samples."""

    def batch(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        """Return samples (B, C, H, W) float32 and labels (B,) int64; arguments as in `fetch`."""
        samples, labels, _ = self.fetch(indices, flips)
        return samples, labels

    def require_flip(self) -> None:
        """Raise a DataError if there are no mirrored samples."""
        if not self.can_flip:
            raise DataError(
                "flip=true needs mirrored copies, and these latents have none: write them with "
                "`tokdyn features ... flip=true`, or train with flip=false."
            )

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        samples, labels = self.batch([index])
        return samples[0], int(labels[0])

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self[index] for index in range(len(self)))

    def _checked(self, indices: Sequence[int], limit: int | None) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """Return the indices as an array; raise an IndexError outside 0 .. limit - 1 (no upper limit if None)."""
        array = np.asarray(indices, dtype=np.int64).reshape(-1)
        if array.size and (array.min() < 0 or (limit is not None and array.max() >= limit)):
            wanted = int(array.min() if array.min() < 0 else array.max())
            raise IndexError(f"sample {wanted} is outside 0 .. {'infinity' if limit is None else limit - 1}")
        return array


def to_signed(pixels: Tensor, flips: Sequence[bool] | None) -> Tensor:
    """Turn bytes into model inputs.

    Args:
        pixels: (B, C, H, W) uint8.
        flips: B booleans, True where the sample is to be mirrored left to right; None for no flips.

    Returns:
        (B, C, H, W) float32 in [-1, 1]; byte v becomes v / 127.5 - 1.
    """
    samples = pixels.to(torch.float32).div_(127.5).sub_(1.0)
    if flips is not None and any(flips):
        mirrored = torch.as_tensor(list(flips), dtype=torch.bool)
        samples[mirrored] = samples[mirrored].flip(-1)
    return samples
