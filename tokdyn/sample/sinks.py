"""Where pictures go: one grid, a folder that can be continued, or an npz."""

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
    """Takes the images of one budget, in rising order."""

    def missing(self) -> list[int]:
        """The images that are still to be made."""

    def write(self, indices: Sequence[int], pixels: Pixels) -> None:
        """Take (B, H, W, 3) uint8 images."""

    def close(self) -> Path:
        """Finish; returns the file or folder that was written."""

    def discard(self) -> None:
        """Give up; nothing half-written stays."""


class GridSink:
    """All images in one PNG.

    Args:
        path: of the PNG.
        captions: one per image.
        columns: images per row; None makes it about square.
    """

    def __init__(self, path: Path, captions: Sequence[str], columns: int | None) -> None:
        self._path, self._captions, self._columns = path, captions, columns
        self.pixels: list[Pixels] = []

    def missing(self) -> list[int]:
        """All of them: a grid is always made anew."""
        return list(range(len(self._captions)))

    def write(self, indices: Sequence[int], pixels: Pixels) -> None:
        """See `Sink`."""
        self.pixels.append(pixels)

    def close(self) -> Path:
        """See `Sink`."""
        return write_png(image_grid(np.concatenate(self.pixels), self._columns, self._captions), self._path)

    def discard(self) -> None:
        """See `Sink`; nothing is written before the end."""


class FolderSink:
    """One PNG per image; those that exist are kept.

    Args:
        folder: to write to.
        below: for each image, the folder inside; empty for none.
    """

    def __init__(self, folder: Path, below: Sequence[str]) -> None:
        self._folder = folder
        self._files = [folder / inside / f"{index:06d}.png" for index, inside in enumerate(below)]

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
        """See `Sink`; the images that are there are whole, and stay to be continued."""


class NpzSink:
    """`arr_0` images uint8 (N, H, W, 3) and `arr_1` labels int64 (N,), written as they come.

    Args:
        path: of the npz.
        labels: one per image.
    """

    def __init__(self, path: Path, labels: Sequence[int]) -> None:
        self._path, self._labels = path, labels
        self._half = half_of(path)
        self._archive: zipfile.ZipFile | None = None
        self._images: IO[bytes] | None = None

    def missing(self) -> list[int]:
        """All of them: an archive is always made anew."""
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
                with suppress(OSError, ValueError):  # a full disk refuses this too
                    part.close()
        with suppress(OSError):
            self._half.unlink()
