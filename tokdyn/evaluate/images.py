"""Read sets of images to evaluate from a folder, a zip or an npz, at their own or at one common size."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tokdyn.data.classes import class_folders
from tokdyn.data.decode import decode, fit
from tokdyn.data.opening import open_source
from tokdyn.data.sources import Labelled, Source
from tokdyn.errors import DataError
from tokdyn.evaluate.npz import IMAGES, NpzImages, npz_keys, open_npz_images
from tokdyn.reading import open_archive

Pixels = NDArray[np.uint8]

_RECORD, _BUDGET = "sample.json", "tail_drop_"  # names that `tokdyn sample` writes
_DECODED_AHEAD = 64  # images that threads decode while the extractor works


@dataclass(frozen=True)
class Labels:
    """The labels of a set of images.

    Attributes:
        values: (N,) int64 labels: the index of the image's class folder in sorted order (see `tokdyn.data.classes`), or
            the label that an npz gives.
        num_classes: Number of class folders; None for an npz, which does not say how many classes there are.
        numbers: For each class folder the number that is its name; None unless all folders are named by numbers.
    """

    values: NDArray[np.int64]
    num_classes: int | None = None
    numbers: tuple[int, ...] | None = None

    def at(self, indices: NDArray[np.int64]) -> Labels:
        """Return the labels of some of the images."""
        return replace(self, values=self.values[indices])

    def among(self, classes: int) -> NDArray[np.int64]:
        """Return the labels (N,) as a network numbers its classes.

        If there are fewer class folders than the network has classes, as in a folder that `tokdyn sample` wrote for a
        few classes, the numbers that the folders are named by are the labels.

        Args:
            classes: Number of classes of the network.
        """
        if self.numbers is None or self.num_classes == classes:
            return self.values
        return np.array(self.numbers, dtype=np.int64)[self.values]


class ImageSet(Protocol):
    """Images in a fixed order, read one after the other.

    Attributes:
        path: Folder or file of the images.
        labels: Class of each image, or None if it is not known.
    """

    @property
    def path(self) -> Path:
        """See the class."""

    @property
    def labels(self) -> Labels | None:
        """See the class."""

    def __len__(self) -> int:
        """Number of images."""

    def images(self, indices: Sequence[int], size: int | None) -> Iterator[Pixels | DataError]:
        """Yield the images (H, W, 3) at ascending positions, or the error of one that cannot be read.

        Args:
            indices: Ascending positions.
            size: Side to resize to (short side, then centre crop, as DiT prepares its data); None keeps their own size.
        """

    def fingerprint(self) -> str:
        """Return a hash of the names, sizes and CRC-32 of the files.

        It does not depend on the path, so that it is the same on another machine.
        """


@dataclass(frozen=True)
class ImageFiles:
    """Image files in a folder, a zip or tar shards. In the first two, the first folder of a path is the class."""

    source: Source
    names: Sequence[str]
    labels: Labels | None

    @property
    def path(self) -> Path:
        """Path of the folder or zip."""
        return Path(self.source.path)

    def __len__(self) -> int:
        """Number of files."""
        return len(self.names)

    def images(self, indices: Sequence[int], size: int | None) -> Iterator[Pixels | DataError]:
        """See `ImageSet`; threads decode images before they are asked for."""

        def read(index: int) -> Pixels | DataError:
            name = self.names[index]
            try:
                content = self.source.read(name)
                target = None if size is None else (size, size)
                return decode(content, f"{name} in {self.path}", target, channels=3).transpose(1, 2, 0)
            except DataError as error:
                return error

        pending: deque[Future[Pixels | DataError]] = deque()
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for index in indices:
                pending.append(pool.submit(read, index))
                if len(pending) > _DECODED_AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def fingerprint(self) -> str:
        """See `ImageSet`."""
        if isinstance(self.source, Labelled):
            rows = zip(self.names, self.source.digests(self.names).tolist(), strict=True)
            return _hash_lines([f"{name} {size} {check}" for name, (size, check) in rows])
        if self.path.is_dir():
            sums = self.source.digests(self.names)
            return _hash_lines([f"{name} {size} {crc}" for name, (size, crc) in zip(self.names, sums, strict=True)])
        return _hash_lines([*_archive_lines(self.path), *self.names])


@dataclass(frozen=True)
class NpzFile:
    """The images `arr_0` of an npz, with `arr_1` as their labels if the file has that array."""

    npz: NpzImages

    @property
    def path(self) -> Path:
        """Path of the file."""
        return self.npz.path

    @property
    def labels(self) -> Labels | None:
        """See `ImageSet`."""
        return None if self.npz.labels is None else Labels(self.npz.labels)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.npz)

    def images(self, indices: Sequence[int], size: int | None) -> Iterator[Pixels | DataError]:
        """See `ImageSet`."""
        for image in self.npz.images(indices):
            yield image if size is None else np.asarray(fit(Image.fromarray(image), (size, size)))

    def fingerprint(self) -> str:
        """See `ImageSet`."""
        return _hash_lines(_archive_lines(self.path))


def open_images(path: Path) -> ImageSet:
    """Open a folder, a zip or an npz of images, without decoding one.

    In a folder that `tokdyn sample` wrote, the sampled images are opened and the pictures beside them are not.

    Raises:
        DataError: There is nothing at the path, or it holds fewer than two images.
    """
    if not path.exists() and not any(parent.is_file() for parent in path.parents):
        raise DataError(f"There is no {path}: give a folder of images, a .zip or an .npz.")
    path = _single_images(path)
    images: ImageSet = NpzFile(_open_npz(path)) if path.suffix == ".npz" and path.is_file() else _open_files(path)
    if len(images) < 2:
        count = "one image" if len(images) else "no images"
        raise DataError(f"{path} holds {count}: give two or more, and thousands for meaningful numbers.")
    return images


def _single_images(path: Path) -> Path:
    """Return the path of the sampled images if `tokdyn sample` wrote the folder `path`; otherwise `path`.

    Raises:
        DataError: The sampling job wrote only pictures of many images, or images with several tail drops.
    """
    record = next((place / _RECORD for place in (path, path.parent) if (place / _RECORD).is_file()), None)
    if record is None or not path.is_dir() or (record.parent != path and not path.name.startswith(_BUDGET)):
        return path
    for place in (path / "images", path / "samples.npz"):
        if place.exists():
            return place
    folders = sorted(place.name for place in path.glob(f"{_BUDGET}*"))
    if any((path / name / kind).exists() for name in folders for kind in ("images", "samples.npz")):
        raise DataError(
            f"{path} holds the images of {len(folders)} tail drops: give one of its folders, {', '.join(folders)}."
        )
    raise DataError(
        f"{path} was written by `tokdyn sample`, but holds only pictures of many images, no single ones: sample with "
        "format=folder or format=npz."
    )


def _open_npz(path: Path) -> NpzImages:
    """Open an npz; raise a DataError if it has no array of images."""
    keys = npz_keys(path)
    if IMAGES not in keys:
        raise DataError(
            f"{path} holds the arrays {', '.join(sorted(keys)) or '(none)'}, expected {IMAGES}, uint8 (N, H, W, 3): "
            "write it with `tokdyn sample format=npz`."
        )
    return open_npz_images(path)


def _open_files(path: Path) -> ImageFiles:
    """Open a folder or zip; the images have classes if all of them are in subfolders."""
    source = open_source(path)
    names = source.names()
    if names and isinstance(source, Labelled):
        found = source.classes(None)
        known = len(found.names) > 1 or found.numbers is not None
        return ImageFiles(source, names, Labels(found.labels, len(found.names), found.numbers) if known else None)
    if not names or not all("/" in name for name in names):
        return ImageFiles(source, names, None)
    classes = class_folders(names)
    return ImageFiles(source, names, Labels(classes.labels, len(classes.names), classes.numbers))


def _archive_lines(path: Path) -> list[str]:
    """Return the name, size and checksum of each file in a zip or npz."""
    with open_archive(path) as archive:
        return [f"{entry.filename} {entry.file_size} {entry.CRC}" for entry in archive.infolist()]


def _hash_lines(lines: list[str]) -> str:
    """Return the SHA-256 of lines of text, which does not depend on their order."""
    return hashlib.sha256("\n".join(sorted(lines)).encode(errors="surrogateescape")).hexdigest()
