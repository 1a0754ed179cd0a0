"""Read the images of tar shards as a source, in the order of the shards and of the files in each."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokdyn.data.classes import ClassFolders, class_folders
from tokdyn.data.ranges import RangeFile
from tokdyn.data.remote.ahead import ReadAhead
from tokdyn.data.remote.cache import CachedFile, Range, bring
from tokdyn.data.sources import EXTENSIONS
from tokdyn.data.tars.index import tar_indices
from tokdyn.errors import DataError
from tokdyn.limits import CLASSES
from tokdyn.reading import one_line, printable


class TarSet:
    """Files of one kind in a set of tars, with their labels.

    Attributes:
        path: path, pattern or address, for messages.
        names: N names: that of the tar, and the path in it.
        labels: N labels, as `TarIndex` has them.
    """

    def __init__(self, path: Any, files: Sequence[RangeFile], extensions: frozenset[str]) -> None:
        """Read the index of every tar.

        Args:
            path: path, pattern or address of the tars.
            files: the tars.
            extensions: of the files that are samples.
        """
        self.path, self._files = path, list(files)
        self.names, self.labels, numbers, places = list[str](), list[str](), list[int](), []
        tars = _distinct([str(file) for file in files])
        for number, index in enumerate(tar_indices(self._files)):
            for name, label, place in zip(index.names, index.labels, index.places, strict=True):
                if PurePosixPath(name).suffix.lower() in extensions:
                    self.names.append(f"{tars[number]}/{name}")
                    self.labels.append(label)
                    numbers.append(number)
                    places.append(place)
        self._inner = [len(tars[number]) + 1 for number in numbers]
        self._numbers, self._places = numbers, np.array(places, dtype=np.int64).reshape(-1, 3)
        self._ahead = ReadAhead([file for file in self._files if isinstance(file, CachedFile)])

    def __len__(self) -> int:
        """Number of files."""
        return len(self.names)

    @property
    def checks(self) -> NDArray[np.int64]:
        """Size in bytes and CRC-32 (N, 2) of the files."""
        return self._places[:, 1:]

    def inner(self, number: int) -> str:
        """Return the path of a file in its tar."""
        return self.names[number][self._inner[number] :]

    def read(self, number: int) -> bytes:
        """Return the content of a file; raise a DataError if it is not what the index says."""
        file, (offset, size, check) = self._files[self._numbers[number]], self._places[number].tolist()
        content = file.read_at(offset, size)
        if zlib.crc32(content) != check and isinstance(file, CachedFile):
            file.forget(offset, size)
            content = file.read_at(offset, size)
        if zlib.crc32(content) != check:
            name = printable(one_line(self.inner(number), 80))
            raise DataError(f"{name} in {file} does not match its checksum: it was damaged or replaced; restore it.")
        return content

    def bring(self, numbers: Sequence[int]) -> None:
        """Bring some files into the cache, if the tars are remote."""
        bring(self._ranges(numbers))

    def read_ahead(self, numbers: Callable[[], Sequence[int]], share: float) -> None:
        """Begin to bring files into the cache that will be read soon, and then the others from `share` of them on."""
        self._ahead.ask(lambda: bring(self._ranges(numbers())), share)

    def _ranges(self, numbers: Sequence[int]) -> list[Range]:
        """Return where some files lie in remote tars."""
        found = []
        for number in numbers:
            file, (offset, size, _) = self._files[self._numbers[number]], self._places[number].tolist()
            if isinstance(file, CachedFile):
                found.append((file, offset, size))
        return found

    def classes(self, num_classes: int | None) -> ClassFolders:
        """Return the classes of the files.

        Numbers are labels themselves, and names are numbered like class folders. Where no file has a label, the first
        folder in the tar is its class, as in zips, and files without a folder form one class "all".

        Args:
            num_classes: expected number of classes, which may be more than the largest number in a label says; 1 puts
                all files into one class.

        Raises:
            DataError: some files have a label and others none, or some a number and others a name.
        """
        kinds = {label[:1] for label in self.labels}
        if num_classes != 1 and len(kinds) > 1:
            first = [
                next(name for name, label in zip(self.names, self.labels, strict=True) if label[:1] == kind)
                for kind in sorted(kinds)
            ]
            said = {"": "no label", "#": "a number as its class", "=": "a name as its class"}
            told = " and ".join(
                f"{printable(one_line(name, 80))} has {said[kind]}"
                for kind, name in zip(sorted(kinds), first, strict=True)
            )
            raise DataError(
                f"In {self.path}, {told}: give every sample a .cls or .json of one kind, or set num_classes=1 to put "
                "all into one class."
            )
        if num_classes == 1 or not kinds:
            return ClassFolders(("all",), np.zeros(len(self), dtype=np.int64), None)
        if kinds == {"#"}:
            labels = np.array([int(label[1:]) for label in self.labels], dtype=np.int64)
            names = tuple(
                str(number) for number in range(max(int(labels.max()) + 1, min(num_classes or 0, CLASSES.value)))
            )
            return ClassFolders(names, labels, tuple(range(len(names))))
        if kinds == {"="}:
            return class_folders([f"{label[1:].replace('/', chr(0x2215))}/" for label in self.labels])
        inner = [self.inner(number) for number in range(len(self))]
        if not any("/" in name for name in inner):
            return ClassFolders(("all",), np.zeros(len(self), dtype=np.int64), None)
        if loose := next((name for name in inner if "/" not in name), None):
            raise DataError(
                f"{self.path} holds files beside its class folders, such as {printable(one_line(loose, 80))}: give "
                "every sample a .cls, or set num_classes=1 to put all into one class."
            )
        return class_folders(inner)


class TarSource:
    """The image files in tar shards; see `tokdyn.data.sources.Source`."""

    def __init__(self, path: Any, files: Sequence[RangeFile]) -> None:
        """Read the index of every tar.

        Args:
            path: path, pattern or address of the tars.
            files: the tars.
        """
        self.path = path
        self.tars = TarSet(path, files, EXTENSIONS)
        self._number = {name: number for number, name in enumerate(self.tars.names)}

    def names(self) -> list[str]:
        """Return the images, each as the name of its tar and its path there, in their order."""
        return list(self.tars.names)

    def read(self, name: str) -> bytes:
        """Return the bytes of one file; see `Source`."""
        return self.tars.read(self._number[name])

    def digests(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return sizes and CRC-32 (N, 2), which the index has; see `Source`."""
        return self.tars.checks[[self._number[name] for name in names]].reshape(-1, 2)

    def classes(self, num_classes: int | None) -> ClassFolders:
        """Return the classes of all images; see `TarSet.classes`."""
        return self.tars.classes(num_classes)

    def bring(self, names: Sequence[str]) -> None:
        """Bring images that are read next into the cache, if the tars are remote."""
        self.tars.bring([self._number[name] for name in names])

    def read_ahead(self, names: Callable[[], Sequence[str]], share: float) -> None:
        """Begin to read images of a later batch; see `Dataset.read_ahead`."""
        self.tars.read_ahead(lambda: [self._number[name] for name in names()], share)


def _distinct(paths: list[str]) -> list[str]:
    """Return names of tars: their file names, or if two are equal, their paths without what all have in common."""
    names = [path.rpartition("/")[2] for path in paths]
    if len(set(names)) == len(names):
        return names
    parts = [path.split("/") for path in paths]
    common = 0
    while len({tuple(each[: common + 1]) for each in parts}) == 1 and common < min(map(len, parts)) - 1:
        common += 1
    return ["/".join(each[common:]) for each in parts]
