"""Ask object storage about files, read parts of them, and try again after errors that may pass."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from tokdyn.data.remote.addresses import PACKAGES, Address
from tokdyn.data.remote.facts import Facts, FinalError
from tokdyn.errors import DataError
from tokdyn.reading import one_line

Result = TypeVar("Result")
_TRIES = 8
PAUSE = 0.5  # seconds before the second try; doubled before each of the others, a minute in all
_AT_ONCE = 16  # requests of one process
_VERSION = ("ETag", "etag", "md5Hash", "blob_id", "mtime", "LastModified", "last_modified", "updated", "created")
_jitter = random.SystemRandom()  # Python's own generator belongs to the run


class Store(Protocol):
    """Remote files by URL. What is raised, a FinalError excepted, is tried again."""

    def facts(self, url: str) -> Facts:
        """Return the size and the version of a file."""

    def read(self, url: str, start: int, stop: int, version: str) -> bytes:
        """Return bytes start .. stop - 1 of a file, or fewer if the connection ends before."""

    def names(self, url: str) -> list[str]:
        """Return the names of the files directly in a folder, sorted."""


class FsspecStore:
    """Files of whatever fsspec reads."""

    def facts(self, url: str) -> Facts:
        """Return size and version; see `Store`."""
        files, path = _file_system(url)
        try:
            files.invalidate_cache()
            info = files.info(path)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FinalError("does not exist: correct the address, or put the file back") from error
        except PermissionError as error:
            raise FinalError(f"must not be read ({one_line(error)}): check your credentials") from error
        if info["type"] != "file" or not isinstance(info.get("size"), int):
            raise FinalError(f"is a {info['type']}, expected a file")
        version = "|".join(str(info[key]) for key in _VERSION if info.get(key) is not None)
        return Facts(info["size"], version)

    def read(self, url: str, start: int, stop: int, version: str) -> bytes:
        """Return a part; see `Store`."""
        files, path = _file_system(url)
        try:
            return bytes(files.cat_file(path, start=start, end=stop))
        except FileNotFoundError as error:
            raise FinalError("does not exist any more: put the file back") from error
        except PermissionError as error:
            raise FinalError(f"must not be read ({one_line(error)}): check your credentials") from error

    def names(self, url: str) -> list[str]:
        """Return names of files; see `Store`."""
        files, path = _file_system(url)
        try:
            found = files.ls(path, detail=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FinalError("does not exist: correct the address") from error
        except PermissionError as error:
            raise FinalError(f"must not be listed ({one_line(error)}): check your credentials") from error
        return sorted(each["name"].rstrip("/").rpartition("/")[2] for each in found if each["type"] == "file")


def open_store(address: Address) -> Store:
    """Return the store of an address; raise a DataError if a package is missing."""
    if address.protocol in ("http", "https"):
        from tokdyn.data.remote.http import HttpStore

        return HttpStore()
    import fsspec

    try:
        fsspec.get_filesystem_class(address.protocol)
    except (ImportError, ValueError) as error:
        package = PACKAGES[address.protocol] or "fsspec"
        raise DataError(
            f"{address} needs the package {package}, which is not installed: pip install {package}"
        ) from error
    return FsspecStore()


def facts(address: Address) -> Facts:
    """Return the size and the version of a remote file."""
    store = open_store(address)
    return patiently(address, lambda: store.facts(address.url))


def names(address: Address) -> list[str]:
    """Return the names of the files directly in a remote folder, sorted."""
    store = open_store(address)
    return patiently(address, lambda: store.names(address.url))


def read(address: Address, start: int, stop: int, version: str) -> bytes:
    """Return bytes start .. stop - 1 of a remote file. A part that breaks off is continued where it did."""
    store, received = open_store(address), bytearray()

    def piece() -> bytes:
        found = store.read(address.url, start + len(received), stop, version)
        if not found:
            raise OSError(f"the connection broke after {len(received)} of {stop - start} bytes")
        return found

    while len(received) < stop - start:
        received += patiently(address, piece)
    if len(received) > stop - start:
        raise DataError(f"{address} sends more bytes than were asked for: use another server, or download it.")
    return bytes(received)


def patiently(address: Address, action: Callable[[], Result]) -> Result:
    """Do something with a remote file, again and again if it fails, with longer and longer pauses.

    Raises:
        DataError: it failed in a way that another try does not change, or too often.
    """
    for number in range(_TRIES):
        try:
            return action()
        except FinalError as error:
            raise DataError(f"{address} {error}.") from error
        except Exception as error:  # of whichever client
            reason = error
        if number + 1 < _TRIES:
            time.sleep(PAUSE * 2**number * _jitter.uniform(0.5, 1.0))
    raise DataError(
        f"{address} cannot be read after {_TRIES} tries ({one_line(reason) or type(reason).__name__}): check the "
        "connection, and run the command again, a training with --resume."
    ) from reason


def in_parallel(actions: Sequence[Callable[[], object]]) -> None:
    """Do things at the same time in a few threads, and raise the first error. The threads do not outlive the call."""
    waiting, errors, taking = iter(actions), list[BaseException](), threading.Lock()

    def work() -> None:
        while not errors:
            with taking:
                action = next(waiting, None)
            if action is None:
                return
            try:
                action()
            except BaseException as error:  # raised again below
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_AT_ONCE, len(actions)))]
    if len(threads) == 1:
        work()
    else:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


def _file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system and the path in it. fsspec keeps one for each process and thread."""
    from fsspec.core import url_to_fs

    found: tuple[Any, str] = url_to_fs(url)
    return found
