"""Define the interface of a data set: labelled tensors by index, one at a time or in batches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from tokdyn.errors import DataError


class Dataset(torch.utils.data.Dataset[tuple[Tensor, int]], ABC):
    """Labelled images or latents of one size.

    Attributes:
        shape: (C, H, W) of every sample.
        class_names: one name per label.
        can_flip: whether samples can be mirrored left to right; latents only if their mirrored copies are stored.
    """

    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    can_flip: bool = True

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples in one epoch."""

    @abstractmethod
    def fetch(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> tuple[Tensor, Tensor, list[int]]:
        """Read samples and their labels.

        Args:
            indices: the indices of B samples.
            flips: B booleans, True for samples to mirror left to right; None mirrors none.

        Returns:
            Samples (B, C, H, W) float32, labels (B,) int64, and the indices of the B samples that were read. An index
            differs from the requested one only if that sample is unreadable and another was read in its place.
        """

    @abstractmethod
    def identity(self) -> dict[str, object]:
        """Return a description of the content as JSON values. Data sets with equal descriptions have equal samples.

        It may read all files once, and has further keys in later versions.
        """

    def read_ahead(
        self, upcoming: Callable[[], tuple[Sequence[int], Sequence[bool] | None]], share: float = 0.0
    ) -> None:
        """Begin to bring samples to this machine that will be read soon, if the data are remote.

        Args:
            upcoming: returns indices and flips of these samples, as in `fetch`.
            share: in [0, 1), differs between processes that read the same data: where among the data to begin with all
                others, once these samples are there.
        """

    def batch(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> tuple[Tensor, Tensor]:
        """Return samples (B, C, H, W) float32 and labels (B,) int64; arguments as in `fetch`."""
        samples, labels, _ = self.fetch(indices, flips)
        return samples, labels

    def require_flip(self) -> None:
        """Raise a DataError if samples cannot be mirrored."""
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
        """Return the indices as an array (B,); raise an IndexError unless all are in 0 .. limit - 1.

        There is no upper limit if `limit` is None.
        """
        array = np.asarray(indices, dtype=np.int64).reshape(-1)
        if array.size and (array.min() < 0 or (limit is not None and array.max() >= limit)):
            wanted = int(array.min() if array.min() < 0 else array.max())
            raise IndexError(f"sample {wanted} is outside 0 .. {'infinity' if limit is None else limit - 1}")
        return array


def to_signed(pixels: Tensor, flips: Sequence[bool] | None) -> Tensor:
    """Scale bytes to the range [-1, 1] of model inputs, and mirror some samples.

    Args:
        pixels: (B, C, H, W) uint8.
        flips: B booleans, True for samples to mirror left to right; None mirrors none.

    Returns:
        (B, C, H, W) float32 in [-1, 1]; byte v becomes v / 127.5 - 1.
    """
    samples = pixels.to(torch.float32).div_(127.5).sub_(1.0)
    if flips is not None and any(flips):
        mirrored = torch.as_tensor(list(flips), dtype=torch.bool)
        samples[mirrored] = samples[mirrored].flip(-1)
    return samples
