"""Read files that may come from strangers: regular files only, no larger than a limit, and JSON no deeper than one.

A pipe would be waited for without end, and a device never ends. What is refused is an OSError or a ValueError, so that
readers raise it as they raise any file that cannot be read: as an error of their own, which names the file.
"""

from __future__ import annotations

import errno
import json
import os
import reprlib
import stat
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

from tokdyn.limits import ARCHIVE_ENTRIES, JSON_BYTES, JSON_DEPTH, TEXT_BYTES, Limit

_QUOTED = reprlib.Repr()
_QUOTED.maxstring = _QUOTED.maxother = _QUOTED.maxlong = 80  # characters
_QUOTED.maxlist = _QUOTED.maxtuple = _QUOTED.maxdict = _QUOTED.maxset = 8
_QUOTED.maxlevel = 3
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


class RefusedFileError(OSError):
    """Raised for a file that is not read, because of what it is or how large it is. Its text is the reason alone."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(errno.EFBIG, reason, str(path))

    def __str__(self) -> str:
        return str(self.strerror)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file, or a link to one, to read its bytes.

    Raises:
        OSError: it cannot be opened, or is a folder, a named pipe, a socket or a device.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = next((name for test, name in _KINDS if test(mode)), "something else")
            raise RefusedFileError(path, f"it is {kind} and no regular file")
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: Path, limit: Limit) -> bytes:
    """Read a regular file.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than the limit.
    """
    with open_regular(path) as file:
        require_size(path, os.fstat(file.fileno()).st_size, limit)
        content = file.read(limit.value + 1)
    require_size(path, len(content), limit)
    return content


def require_size(path: Path, size: int, limit: Limit) -> None:
    """Raise a RefusedFileError if `size`, a number of what the limit counts in a file, is above the limit."""
    if excess := limit.excess(size):
        raise RefusedFileError(path, f"it has {excess}")


def read_text(path: Path, limit: Limit = TEXT_BYTES) -> str:
    """Read a regular file of UTF-8 text.

    Raises:
        OSError: as `read_bytes`.
        ValueError: it is no UTF-8 text.
    """
    return read_bytes(path, limit).decode("utf-8")


def read_json(path: Path) -> Any:
    """Read a regular file of JSON.

    Raises:
        OSError: as `read_bytes`.
        ValueError: it is no JSON, or nested more deeply than the limit.
    """
    return parse_json(read_text(path, JSON_BYTES))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; raise a ValueError if it is none, or is nested more deeply than the limit."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(
            f"it is nested more deeply than the {JSON_DEPTH.value} levels of {JSON_DEPTH.variable}"
        ) from error
    depth, level = 0, [content]
    while level := [each for each in level if isinstance(each, (list, dict))]:
        depth += 1
        if excess := JSON_DEPTH.excess(depth):
            raise ValueError(f"it is nested in {excess}")
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return content


def open_archive(path: Path) -> zipfile.ZipFile:
    """Open a zip or npz file.

    Raises:
        OSError, zipfile.BadZipFile: it cannot be opened, is no archive, or has more entries than the limit.
    """
    open_regular(path).close()
    try:
        archive = zipfile.ZipFile(path)
    except OSError:
        raise
    except Exception as error:  # a damaged directory of entries can raise anything
        raise zipfile.BadZipFile(str(error) or type(error).__name__) from error
    try:
        require_size(path, len(archive.filelist), ARCHIVE_ENTRIES)
    except BaseException:
        archive.close()
        raise
    return archive


def shown(value: Any) -> str:
    """Return a value as an error message quotes it: in a few words, however large it is."""
    try:
        return _QUOTED.repr(value)
    except ValueError:  # an integer of thousands of digits
        return "an integer of thousands of digits"


def one_line(text: object, length: int = 240) -> str:
    """Return a text, such as the message of another library, on one line that has at most so many characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= length else f"{line[: length - 3]}..."


def printable(text: str) -> str:
    """Return a text with escapes in place of what a terminal would act on: names of files can hold any character."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "backslashreplace").decode() for each in text
    )
