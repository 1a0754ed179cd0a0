"""List and read the image files of a folder or a zip, in the same order from both."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from tokdyn.data.classes import ClassFolders
from tokdyn.data.digests import folder_digests
from tokdyn.errors import DataError
from tokdyn.limits import ARCHIVE_ENTRIES, IMAGE_BYTES
from tokdyn.reading import one_line, open_archive, read_bytes, require_size

EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".tga"}
)
TAR = ".tar"
INDEX = "index.json"  # of latents


class Source(Protocol):
    """A folder, a zip or tar shards of image files; `path` is its path, or as text its pattern or address."""

    path: Any

    def names(self) -> list[str]:
        """Return the paths of the image files, relative to the root and with forward slashes, sorted part by part."""

    def read(self, name: str) -> bytes:
        """Return the bytes of one file; raise a DataError with its name if it cannot be read."""

    def digests(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return the size in bytes and the CRC-32 (N, 2) of some files; -1 where they cannot be read."""


@runtime_checkable
class ReadsAhead(Protocol):
    """A source whose files may be remote, and come through the cache."""

    def bring(self, names: Sequence[str]) -> None:
        """Bring files that are read next into the cache, all at the same time."""

    def read_ahead(self, names: Callable[[], Sequence[str]], share: float) -> None:
        """Begin to bring files of a later batch into the cache; see `Dataset.read_ahead`."""


@runtime_checkable
class Labelled(Protocol):
    """A source that says the classes of its files in another way than by folders."""

    def classes(self, num_classes: int | None) -> ClassFolders:
        """Return the classes of all files; `num_classes` is the expected number of them."""


class FolderSource:
    """The image files below a folder, linked folders included."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """Return the image files; see `Source`."""
        names: list[str] = []
        visited: set[str] = set()
        for folder, children, files in os.walk(self.path, onerror=self._raise, followlinks=True):
            real = os.path.realpath(folder)
            if real in visited:  # a link to a folder above itself
                children.clear()
                continue
            visited.add(real)
            below = Path(folder).relative_to(self.path)
            names.extend((below / name).as_posix() for name in files)
            if excess := ARCHIVE_ENTRIES.excess(len(names)):
                raise DataError(f"{self.path} has {excess}.")
            children[:] = [name for name in children if not hidden(name)]
        return _images(names)

    def _raise(self, error: OSError) -> None:
        """Raise the error of a folder that cannot be listed, because `os.walk` would leave the folder out silently."""
        raise DataError(f"The folder {error.filename} cannot be read: {error.strerror}.") from error

    def read(self, name: str) -> bytes:
        """Return the bytes of one file; see `Source`."""
        try:
            return read_bytes(self.path / name, IMAGE_BYTES)
        except OSError as error:
            raise DataError(f"{name} in {self.path} cannot be read: {error.strerror or error}.") from error

    def digests(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return sizes and CRC-32; see `Source`. A file is read only the first time and when it has changed."""
        return folder_digests(self.path, names)


class ZipSource:
    """The image files in a zip, or in one folder of it. Each process that reads opens the archive for itself."""

    def __init__(self, path: Path, folder: str = "") -> None:
        """Open the archive.

        Args:
            path: the zip file.
            folder: folder in the archive that is taken as the root; "" takes the archive itself.
        """
        self.path = path
        self.folder = f"{folder.strip('/')}/" if folder.strip("/") else ""
        self._archive: tuple[int, zipfile.ZipFile] | None = None

    def names(self) -> list[str]:
        """Return the image files; see `Source`."""
        names = self._open().namelist()
        if self.folder and not any(name.startswith(self.folder) for name in names):
            raise DataError(
                f"There is no folder {self.folder} in {self.path}: correct it, or give the path of the zip alone."
            )
        return _images([name.removeprefix(self.folder) for name in names if name.startswith(self.folder)])

    def read(self, name: str) -> bytes:
        """Return the bytes of one file; see `Source`."""
        archive = self._open()
        try:
            entry = archive.getinfo(self.folder + name)
            require_size(self.path, entry.file_size, IMAGE_BYTES)
            return archive.read(entry)
        except Exception as error:  # a damaged or hostile archive can raise anything: zlib.error, LZMAError, ...
            raise DataError(
                f"{name} in {self.path} cannot be read: {one_line(error) or type(error).__name__}."
            ) from error

    def digests(self, names: Sequence[str]) -> NDArray[np.int64]:
        """Return sizes and CRC-32, as the archive lists them; see `Source`."""
        entries = [self._open().getinfo(self.folder + name) for name in names]
        return np.array([(entry.file_size, entry.CRC) for entry in entries], dtype=np.int64).reshape(-1, 2)

    def _open(self) -> zipfile.ZipFile:
        """Return the archive, opened by this process: after a fork, two processes must not share a file position."""
        if self._archive is None or self._archive[0] != os.getpid():
            try:
                self._archive = (os.getpid(), self._archive_file())
            except (zipfile.BadZipFile, OSError) as error:
                raise DataError(
                    f"{self.path} is not a readable zip file ({one_line(error)}): give a folder of images or an "
                    "intact .zip."
                ) from error
        return self._archive[1]

    def _archive_file(self) -> zipfile.ZipFile:
        """Open the archive; raise a BadZipFile or an OSError if it cannot be read."""
        return open_archive(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_archive": None}


def hidden(part: str) -> bool:
    """Return whether a part of a path is hidden or is the folder of metadata that macOS adds to zips."""
    return part.startswith(".") or part == "__MACOSX"


def _images(names: list[str]) -> list[str]:
    """Keep the visible files with the extension of an image, sorted by the parts of their path."""
    paths = [PurePosixPath(name) for name in names if not name.endswith("/")]
    kept = [path for path in paths if path.suffix.lower() in EXTENSIONS and not any(map(hidden, path.parts))]
    return [path.as_posix() for path in sorted(kept, key=lambda path: path.parts)]
