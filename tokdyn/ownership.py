"""Give a folder one owner at a time, so that two processes never write into the same run."""

from __future__ import annotations

import errno
import os
import socket
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tokdyn.errors import OutputError
from tokdyn.files import writing
from tokdyn.progress import tell

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"
"""Name of the file that the owner of a folder keeps locked. The file alone says nothing: only the lock counts."""
_TRIES = 10  # the file may be removed by its last owner between opening and locking
_held: set[int] = set()  # descriptors of the locks of this process


def _close_in_child() -> None:
    """Close the locks that a forked process inherits, so that they end with the process that took them."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def holds_nothing(folder: Path) -> bool:
    """Return whether a folder does not exist or is empty, apart from the lock of its owner."""
    return not folder.exists() or all(entry.name == LOCK for entry in folder.iterdir())


@contextmanager
def owning(folder: Path) -> Iterator[Callable[[], None]]:
    """Own a folder; a context manager. No other process can own it meanwhile.

    The system takes the lock from a process that ends, however it ends, so that a crash leaves none behind. The folder
    is created, and removed again if nothing was written into it. A file system without locks is used without one.

    Args:
        folder: The folder.

    Yields:
        A function that raises an OutputError if the folder was moved, removed or unmounted, to be called before
        something is written into it.

    Raises:
        OutputError: Another process owns the folder, or it cannot be written to.
    """
    path = folder / LOCK
    mark = f"process {os.getpid()} on {socket.gethostname()}\n{uuid.uuid4()}\n"
    existed = folder.exists()

    def check() -> None:
        if _text(path) != mark:
            raise OutputError(
                f"{folder} is not the folder any more that this run began in: it was moved, removed or unmounted. Put "
                "it back and continue with --resume."
            )

    descriptor = None
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _lock(folder, mark)
        _held.add(descriptor)
        yield check
    finally:
        with suppress(OSError):
            if descriptor is not None and _text(path) == mark:
                path.unlink()
            if not existed:
                folder.rmdir()  # only if it is empty
        if descriptor is not None:
            _held.discard(descriptor)
            os.close(descriptor)


def _lock(folder: Path, mark: str) -> int:
    """Lock the file in a folder, write the owner's mark into it, and return its descriptor."""
    path = folder / LOCK
    for _ in range(_TRIES):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if sys.platform == "win32":
                raise OSError(errno.ENOSYS, "not on Windows")
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _text(path).partition("\n")[0]
            os.close(descriptor)
            raise OutputError(
                f"{folder} is in use by {owner or 'another process'}: wait until it ends, or choose another out=FOLDER."
            ) from error
        except OSError as error:
            tell(f"{folder} cannot be locked ({error.strerror}), so nothing keeps a second process out of it.")
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, mark.encode())
        except OSError:  # such as a full disk
            path.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        if _text(path) == mark:  # otherwise the file was removed before it was locked
            return descriptor
        os.close(descriptor)
    raise OutputError(f"{path} is removed again and again by another process: choose another out=FOLDER.")


def _text(path: Path) -> str:
    """Return the text of a lock; "" if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
