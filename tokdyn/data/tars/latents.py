"""Read latents of tar shards: `KEY.npy` (c, h, w) of each sample, and `KEY.flip.npy` of the mirrored image."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from torch import Tensor

from tokdyn.data.base import Dataset
from tokdyn.data.ranges import RangeFile
from tokdyn.data.tars.index import ARRAY, sample_key
from tokdyn.data.tars.source import TarSet
from tokdyn.errors import DataError
from tokdyn.limits import ARRAY_BYTES
from tokdyn.reading import one_line, printable

_MIRRORED = f".flip{ARRAY}"
_DTYPES = (np.dtype("<f2"), np.dtype("<f4"))


class TarLatents(Dataset):
    """Latents in tar shards, as WebDataset writes them, already scaled as model inputs; fp16 or fp32.

    A tar does not say which autoencoder encoded them.
    """

    def __init__(self, path: Any, files: Sequence[RangeFile], num_classes: int | None = None) -> None:
        """Read the index of every tar, and the first latent.

        Args:
            path: path, pattern or address of the tars.
            files: the tars.
            num_classes: expected number of classes; see `TarSet.classes`.

        Raises:
            DataError: there are no latents, or a file cannot be read.
        """
        self._tars = TarSet(path, files, frozenset({ARRAY}))
        names = self._tars.names
        self._plain = [number for number, name in enumerate(names) if not name.endswith(_MIRRORED)]
        if not self._plain:
            raise DataError(f"{path} holds no latents: give tars with an array {ARRAY} (c, h, w) for each sample.")
        mirrored = {
            sample_key(names[number]): number for number in range(len(names)) if names[number].endswith(_MIRRORED)
        }
        self._mirrored = [mirrored.get(sample_key(names[number]), -1) for number in self._plain]
        self.can_flip = min(self._mirrored) >= 0
        classes = self._tars.classes(num_classes)
        self.class_names, self._labels = classes.names, classes.labels[self._plain]
        self.shape = self._header(self._plain[0])
        self._identity: dict[str, object] | None = None

    def __len__(self) -> int:
        """Number of samples, mirrored copies not counted."""
        return len(self._plain)

    def fetch(self, indices: Sequence[int], flips: Sequence[bool] | None = None) -> tuple[Tensor, Tensor, list[int]]:
        """Read latents; see `Dataset.fetch`. A mirrored sample is the stored latent of the mirrored image."""
        wanted = self._checked(indices, len(self))
        numbers = self._numbers(wanted, flips)
        self._tars.bring(numbers)
        samples = torch.empty(len(wanted), *self.shape)
        for place, number in enumerate(numbers):
            samples[place] = torch.from_numpy(self._array(number))
        return samples, torch.from_numpy(self._labels[wanted]), wanted.tolist()

    def identity(self) -> dict[str, object]:
        """Return names, labels, sizes and CRC-32 of the arrays as hashes; see `Dataset.identity`."""
        if self._identity is None:
            names = [self._tars.names[number] for number in self._plain]
            listing = "\n".join(f"{label} {name}" for label, name in zip(self._labels, names, strict=True))
            files = sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
            content = sha256(self._tars.checks.astype("<i8").tobytes()).hexdigest()
            self._identity = {"kind": "tar latents", "shape": list(self.shape), "files": files, "content": content}
        return self._identity

    def read_ahead(
        self, upcoming: Callable[[], tuple[Sequence[int], Sequence[bool] | None]], share: float = 0.0
    ) -> None:
        """Begin to read samples of a later batch, if the tars are remote; see `Dataset.read_ahead`."""

        def numbers() -> list[int]:
            indices, flips = upcoming()
            return self._numbers(self._checked(indices, len(self)), flips)

        self._tars.read_ahead(numbers, share)

    def _numbers(self, wanted: NDArray[np.int64], flips: Sequence[bool] | None) -> list[int]:
        """Return the numbers in the set of tars of samples or their mirrored copies."""
        mirrored = [False] * len(wanted) if flips is None else flips
        if any(mirrored):
            self.require_flip()
        return [
            self._mirrored[index] if flip else self._plain[index]
            for index, flip in zip(wanted.tolist(), mirrored, strict=True)
        ]

    def _header(self, number: int) -> tuple[int, int, int]:
        """Return the shape (c, h, w) of the first array."""
        array = self._load(number)
        if array.ndim != 3 or not array.size:
            raise self._wrong(number, f"has the shape {array.shape}, expected (c, h, w)")
        return (array.shape[0], array.shape[1], array.shape[2])

    def _array(self, number: int) -> NDArray[np.float32]:
        """Return an array (c, h, w) as float32."""
        array = self._load(number)
        if array.shape != self.shape:
            raise self._wrong(number, f"has the shape {array.shape}, but the first one has {self.shape}")
        return array.astype(np.float32)

    def _load(self, number: int) -> NDArray[Any]:
        """Parse an array; nothing is unpickled, and nothing is allocated before its size is known to be right."""
        content = self._tars.read(number)
        file = io.BytesIO(content)
        try:
            version = npy.read_magic(file)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, fortran, dtype = read(file)
            if dtype not in _DTYPES:
                raise ValueError(f"it holds {dtype}, expected float16 or float32")
            if excess := ARRAY_BYTES.excess(len(content)):
                raise ValueError(f"it has {excess}")
            array = np.frombuffer(content, dtype, offset=file.tell())
            return array.reshape(shape, order="F" if fortran else "C")
        except Exception as error:  # a damaged or hostile header can raise anything
            raise self._wrong(number, f"is no array that can be read ({one_line(error)})") from error

    def _wrong(self, number: int, reason: str) -> DataError:
        """Return the error for an array."""
        return DataError(f"{printable(one_line(self._tars.names[number], 120))} in {self._tars.path} {reason}.")
