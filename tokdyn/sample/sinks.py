"""Write sampled images: as one grid, as a folder of PNGs that can be resumed, or as an npz."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from tokdyn.files import half_of, writing
from tokdyn.report.grids import image_grid
from tokdyn.report.pixels import Pixels, write_png


class Sink(Protocol):
    """A writer of the images of one tail drop, which are numbered from 0 and written in ascending order.

    Attributes:
        apart: whether each image has a file of its own, so that several processes can write them, in any order.
    """

    apart: bool

    def missing(self) -> list[int]:
        """Return the indices of the images that are still to be sampled."""

    def write(self, indices: Sequence[int], pixels: Pixels) -> None:
        """Take B more images, (B, H, W, 3) uint8, with their indices."""

    def close(self) -> Path:
        """Finish writing, and return the path of the file or folder."""

    def discard(self) -> None:
        """Stop writing after an error, and remove incomplete files."""


class GridSink:
    """Writes all images into one PNG, when it is closed.

    Args:
        path: path of the PNG.
        captions: one caption per image.
        columns: images per row; None makes it about square.
    """

    apart = False

    def __init__(self, path: Path, captions: Sequence[str], columns: int | None) -> None:
        self._path, self._captions, self._columns = path, captions, columns
        self.pixels: list[Pixels] = []

    def missing(self) -> list[int]:
        """Return the indices of all images: an existing grid is replaced."""
        return list(range(len(self._captions)))

    def write(self, indices: Sequence[int], pixels: Pixels) -> None:
        """See `Sink`."""
        self.pixels.append(pixels)

    def close(self) -> Path:
        """See `Sink`."""
        return write_png(image_grid(np.concatenate(self.pixels), self._columns, self._captions), self._path)

    def discard(self) -> None:
        """See `Sink`; there is nothing to remove, because nothing is written before `close`."""


class FolderSink:
    """Writes one PNG per image, `000000.png` and so on; PNGs that exist are kept.

    Args:
        folder: folder to write to.
        subfolders: subfolder of each image; "" is the folder itself.
    """

    apart = True

    def __init__(self, folder: Path, subfolders: Sequence[str]) -> None:
        self._folder = folder
        self._files = [folder / subfolder / f"{index:06d}.png" for index, subfolder in enumerate(subfolders)]

    def missing(self) -> list[int]:
        """See `Sink`."""
        return [index for index, file in enumerate(self._files) if not file.is_file()]

    def write(self, indices: Sequence[int], pixels: Pixels) -> None:
        """See `Sink`."""
        for index, image in zip(indices, pixels, strict=True):
            write_png(image, self._files[index])

    def close(self) -> Path:
        """See `Sink`."""
        return self._folder

    def discard(self) -> None:
        """See `Sink`; there is nothing to remove, because each PNG is written atomically."""


class NpzSink:
    """Writes an npz batch by batch: the images as `arr_0`, uint8 (N, H, W, 3), and the labels as `arr_1`, int64 (N,).

    The file appears when it is closed.

    Args:
        path: path of the npz.
        labels: one label per image.
    """

    apart = False

    def __init__(self, path: Path, labels: Sequence[int]) -> None:
        self._path, self._labels = path, labels
        self._half = half_of(path)
        self._archive: zipfile.ZipFile | None = None
        self._images: IO[bytes] | None = None

    def missing(self) -> list[int]:
        """Return the indices of all images: an existing archive is replaced."""
        return list(range(len(self._labels)))

    def write(self, indices: Sequence[int], pixels: Pixels) -> None:
        """See `Sink`."""
        with writing(self._path):
            if self._images is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._archive = zipfile.ZipFile(self._half, "w", zipfile.ZIP_STORED)
                self._images = self._archive.open("arr_0.npy", "w", force_zip64=True)
                shape = (len(self._labels), *pixels.shape[1:])
                header = {"descr": np.lib.format.dtype_to_descr(pixels.dtype), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(self._images, header)
            self._images.write(np.ascontiguousarray(pixels).data)

    def close(self) -> Path:
        """See `Sink`."""
        if self._images is not None and self._archive is not None:
            with writing(self._path):
                self._images.close()
                with self._archive.open("arr_1.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(self._labels, dtype=np.int64), allow_pickle=False)
                self._archive.close()
                self._half.replace(self._path)
        return self._path

    def discard(self) -> None:
        """See `Sink`."""
        for part in (self._images, self._archive):
            if part is not None:
                with suppress(OSError, ValueError):  # on a full disk closing fails too
                    part.close()
        with suppress(OSError):
            self._half.unlink()
