"""Read npz archives: small arrays at once, and images one by one, because 50,000 of them may not fit in memory."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from tokdyn.errors import DataError, TokdynError
from tokdyn.limits import ARRAY_BYTES
from tokdyn.reading import one_line, open_archive

IMAGES = "arr_0"
LABELS = "arr_1"
_HEADER = 2**17  # bytes of a header, at least; numpy refuses longer ones itself


def npz_keys(path: Path) -> set[str]:
    """Return the names of the arrays in an npz; raise a DataError if the file is not one."""
    with _opened(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def npz_array(path: Path, key: str) -> NDArray[Any]:
    """Read one array of an npz at once; raise a DataError if it cannot be read."""
    with _array(path, key) as (file, shape, fortran, dtype):
        count = math.prod(shape)
        if excess := ARRAY_BYTES.excess(count * dtype.itemsize):
            raise DataError(f"{path}: the array {key} has {excess}.")
        content = file.read(count * dtype.itemsize)
        flat = np.frombuffer(content, dtype, count) if count else np.empty(0, dtype)
        array = flat.reshape(shape, order="F" if fortran else "C")
    return array


@dataclass(frozen=True)
class NpzImages:
    """The images of an npz, in file order.

    Attributes:
        path: Path of the file.
        shape: (N, H, W, 3).
        labels: (N,) int64 from `arr_1`, or None if there is no such array.
    """

    path: Path
    shape: tuple[int, int, int, int]
    labels: NDArray[np.int64] | None

    def __len__(self) -> int:
        return self.shape[0]

    def images(self, indices: Sequence[int]) -> Iterator[NDArray[np.uint8]]:
        """Yield the images (H, W, 3) with the given indices, which are in ascending order, one at a time.

        Raises:
            DataError: The file ends early or is damaged.
        """
        size = math.prod(self.shape[1:])
        with _array(self.path, IMAGES) as (file, *_):
            position = 0
            for index in indices:
                while position < index:
                    file.read(size)
                    position += 1
                data = file.read(size)
                position += 1
                if len(data) != size:
                    raise DataError(f"{self.path} ends before image {index} of {len(self)}: write it again.")
                yield np.frombuffer(data, dtype=np.uint8).reshape(self.shape[1:])


def open_npz_images(path: Path) -> NpzImages:
    """Check the header of `arr_0` and the labels of an npz, without reading an image.

    Raises:
        DataError: The arrays do not have the shape and dtype that `tokdyn sample format=npz` writes.
    """
    with _array(path, IMAGES) as (_, shape, fortran, dtype):
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or fortran or 0 in shape[1:]:
            raise DataError(
                f"{path}: {IMAGES} is {dtype} of shape {shape}, expected uint8 of shape (N, H, W, 3) in C order: "
                "write it "
                "as `tokdyn sample format=npz` does."
            )
        if excess := ARRAY_BYTES.excess(math.prod(shape[1:])):
            raise DataError(f"{path}: an image of {IMAGES} has {excess}.")
    labels = None
    if LABELS in npz_keys(path):
        labels = npz_array(path, LABELS)
        if labels.shape != shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"{path}: {LABELS} is {labels.dtype} of shape {labels.shape}, expected one integer label for each of "
                f"the {shape[0]} images: correct the labels, or remove them."
            )
        labels = labels.astype(np.int64)
    return NpzImages(path, (shape[0], shape[1], shape[2], shape[3]), labels)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an npz as a zip archive; raise a DataError if it is not one."""
    try:
        archive = open_archive(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} is not an npz archive ({one_line(error)}): write it again.") from error
    with archive:
        yield archive


@contextmanager
def _array(path: Path, key: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype[Any]]]:
    """Open an array of an npz: a file at its first element, its shape, whether it is in Fortran order, and its dtype.

    Raises:
        DataError: There is no such array, it holds Python objects, its header does not fit its size, or it is damaged.
    """
    with _opened(path) as archive:
        try:
            entry = archive.getinfo(f"{key}.npy")
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(file)
                if dtype.hasobject or any(side < 0 for side in shape):
                    raise ValueError(f"it is {dtype} of shape {shape}")
                rest = entry.file_size - math.prod(shape) * dtype.itemsize
                if not 0 < rest <= _HEADER:
                    raise ValueError(f"it says that it is {dtype} of shape {shape}, and has {entry.file_size:,} bytes")
                yield file, shape, fortran, dtype
        except TokdynError:
            raise
        except Exception as error:  # a damaged or hostile archive can raise anything: zlib.error, LZMAError, ...
            reason = one_line(error) or type(error).__name__
            raise DataError(f"{path}: the array {key} cannot be read ({reason}): write it again.") from error
