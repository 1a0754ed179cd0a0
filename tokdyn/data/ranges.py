"""Read parts of a file, wherever it lies: on the local disk, or in the cache of a remote one."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tokdyn.errors import DataError
from tokdyn.reading import open_regular


class RangeFile(Protocol):
    """A file that is read in parts. As text it is its path or address."""

    @property
    def name(self) -> str:
        """The file name."""

    @property
    def size(self) -> int:
        """The size in bytes."""

    @property
    def version(self) -> str:
        """A text that changes with the content."""

    def read_at(self, start: int, length: int) -> bytes:
        """Return some bytes; raise a DataError if they cannot be read."""


class LocalFile:
    """A file of the local disk. It is opened for every part, because a set of shards may have thousands of files."""

    def __init__(self, path: Path) -> None:
        """Look at the file; raise a DataError if it is no regular file."""
        self.path = path
        with self._reading(), open_regular(path) as file:
            state = os.fstat(file.fileno())
        self.size, self.version = state.st_size, f"{state.st_mtime_ns} {state.st_ctime_ns}"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The file name."""
        return self.path.name

    def read_at(self, start: int, length: int) -> bytes:
        """Return some bytes; see `RangeFile`."""
        with self._reading(), open_regular(self.path) as file:
            content = os.pread(file.fileno(), length, start)
        if len(content) < length:
            raise DataError(f"{self.path} has become shorter since it was opened: restore it.")
        return content

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Raise errors of the operating system in the block as a DataError with the path."""
        try:
            yield
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}.") from error


class RangeReader(io.RawIOBase):
    """A RangeFile as a file of Python, for readers that want one."""

    def __init__(self, file: RangeFile) -> None:
        super().__init__()
        self._file, self._place = file, 0

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def seekable(self) -> bool:
        """Return that every place can be gone to."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        self._place = max(0, base + offset)
        return self._place

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer and return the number of bytes; 0 at the end."""
        content = self._file.read_at(self._place, max(0, min(len(buffer), self._file.size - self._place)))
        buffer[: len(content)] = content
        self._place += len(content)
        return len(content)
