"""Keep parts of remote files on the local disk, for several processes at once.

A cached file has the length of the remote one, and has holes where nothing was read yet. A table at its end holds, for
each block of 256 KiB, the CRC-32 of what was written there: a block that a crash or a disk has spoilt is read anew.
Blocks are written before their entry of the table, and each is the same whoever writes it, so processes need no lock.
The name depends on the address, size and version of the remote file: one that was replaced begins anew.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tokdyn.data.remote.addresses import Address
from tokdyn.data.remote.facts import Facts
from tokdyn.data.remote.store import facts, in_parallel, read
from tokdyn.errors import DataError
from tokdyn.files import require_folder

BLOCK = 2**18  # bytes
_RUN = 32  # blocks of one request while a file is filled
_FOLLOWING = 16  # blocks of one request while a file is read from one end to the other
_ENTRY = struct.Struct("<Q")
_PRESENT = 1 << 32  # above the 32 bits of the checksum
_OPENED = 64  # files that a process keeps open

Range = tuple["CachedFile", int, int]
"""A part of a file: its first byte and its length."""


class _Opened:
    """An open file of the cache, and the blocks that this process has compared with their checksums.

    It is closed when its last user has let go of it, so that no thread reads from a descriptor that means another file.
    """

    def __init__(self, path: Path, size: int, blocks: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b", buffering=0)  # noqa: SIM115
        self.descriptor = self._file.fileno()
        self.verified = bytearray(blocks)
        self.full = False  # whether the last blocks could not be written
        os.ftruncate(self.descriptor, size + _ENTRY.size * blocks)
        os.utime(path)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


opened_here: dict[tuple[int, Path], _Opened] = {}  # by process and path


class CachedFile:
    """A remote file that is read through the cache."""

    def __init__(self, address: Address, found: Facts, folder: Path) -> None:
        """Describe the file; nothing is read.

        Args:
            address: its address.
            found: its size and version.
            folder: folder of the cache.
        """
        self.address, self.size, self.version = address, found.size, found.version
        key = hashlib.sha256(f"{address.url}\n{found.size}\n{found.version}".encode()).hexdigest()[:40]
        self.path = folder / f"{key}.cached"
        self._blocks = -(-self.size // BLOCK)

    def __str__(self) -> str:
        return str(self.address)

    @property
    def name(self) -> str:
        """The file name."""
        return self.address.name

    def read_at(self, start: int, length: int) -> bytes:
        """Return some bytes; raise a DataError if they cannot be had."""
        stop = start + length
        if not 0 <= start <= stop <= self.size:
            raise DataError(f"{self} ends after {self.size} bytes, but bytes {start} to {stop} were looked for.")
        if not length:
            return b""
        opened = self._open()
        numbers = range(start // BLOCK, (stop - 1) // BLOCK + 1)
        held: dict[int, bytes] = {}
        for first, last in _runs(number for number in numbers if not self._present(opened, number, held)):
            held |= self._fetch(opened, first, self._further(opened, first, last))
        parts = []
        for number in numbers:
            low, high = max(start, number * BLOCK), min(stop, (number + 1) * BLOCK)
            if number in held:
                parts.append(held[number][low - number * BLOCK : high - number * BLOCK])
            elif opened is not None:
                parts.append(os.pread(opened.descriptor, high - low, low))
        return b"".join(parts)

    def fill(self) -> Iterator[bool]:
        """Bring the missing parts of the file into the cache, with a pause after each request.

        Yields:
            True; False if another process does it, or the cache cannot be written, and then ends.
        """
        opened = self._open()
        if opened is None:
            yield False
            return
        try:
            with FileLock(self.path.with_suffix(".lock"), timeout=0):
                for start in range(0, self._blocks, _RUN):
                    numbers = range(start, min(start + _RUN, self._blocks))
                    for first, last in _runs(number for number in numbers if not self._present(opened, number, None)):
                        self._fetch(opened, first, last)
                        if opened.full:
                            yield False
                            return
                        yield True
        except (Timeout, OSError):
            yield False

    def settled(self) -> bool:
        """Return whether the cache has the whole file, as far as its table says, or cannot be written at all."""
        opened = self._open()
        if opened is None or opened.full:
            return True
        table = os.pread(opened.descriptor, _ENTRY.size * self._blocks, self.size)
        return len(table) == _ENTRY.size * self._blocks and all(entry for (entry,) in _ENTRY.iter_unpack(table))

    def missing(self, start: int, length: int) -> set[int]:
        """Return the blocks of a part that are not in the cache; none if the cache cannot be written."""
        opened = self._open()
        if opened is None or opened.full or length < 1:
            return set()
        numbers = range(start // BLOCK, (start + length - 1) // BLOCK + 1)
        return {number for number in numbers if not self._present(opened, number, None)}

    def bring(self, first: int, last: int) -> None:
        """Read blocks first .. last into the cache."""
        self._fetch(self._open(), first, last)

    def forget(self, start: int, length: int) -> None:
        """Read a part anew the next time: its content is not what it should be."""
        opened = self._open()
        if opened is not None:
            for number in range(start // BLOCK, (start + length - 1) // BLOCK + 1):
                opened.verified[number] = 0
                with suppress(OSError):
                    os.pwrite(opened.descriptor, bytes(_ENTRY.size), self.size + _ENTRY.size * number)

    def _open(self) -> _Opened | None:
        """Return the open file of this process; None, with a warning, if the cache cannot be written."""
        key = os.getpid(), self.path
        opened = opened_here.get(key)
        if opened is None:
            try:
                opened = _Opened(self.path, self.size, self._blocks)
            except OSError as error:
                _warn(self.path.parent, error)
                return None
            opened_here[key] = opened
            for other in list(opened_here)[:-_OPENED]:
                opened_here.pop(other, None)
        return opened

    def _present(self, opened: _Opened | None, number: int, held: dict[int, bytes] | None) -> bool:
        """Return whether a block is in the cache, undamaged. What is read to find out is put into `held`."""
        if opened is None or opened.verified[number]:
            return opened is not None
        entry = os.pread(opened.descriptor, _ENTRY.size, self.size + _ENTRY.size * number)
        if len(entry) < _ENTRY.size or entry == bytes(_ENTRY.size):
            return False
        start = number * BLOCK
        block = os.pread(opened.descriptor, min(BLOCK, self.size - start), start)
        if zlib.crc32(block) | _PRESENT != _ENTRY.unpack(entry)[0]:
            return False
        opened.verified[number] = 1
        if held is not None:
            held[number] = block
        return True

    def _further(self, opened: _Opened | None, first: int, last: int) -> int:
        """Return the last block to request: some more than `last` if the block before `first` was read already."""
        if opened is None or not first or not opened.verified[first - 1]:
            return last
        end = min(first + _FOLLOWING, self._blocks)
        return next(
            (number - 1 for number in range(last + 1, end) if self._present(opened, number, None)), max(last, end - 1)
        )

    def _fetch(self, opened: _Opened | None, first: int, last: int) -> dict[int, bytes]:
        """Read blocks first .. last from afar, and write them to the cache."""
        start, stop = first * BLOCK, min((last + 1) * BLOCK, self.size)
        content = memoryview(read(self.address, start, stop, self.version))
        blocks = {number: bytes(content[(number - first) * BLOCK :][:BLOCK]) for number in range(first, last + 1)}
        if opened is not None:
            opened.full = not self._written(opened, blocks)
        return blocks

    def _written(self, opened: _Opened, blocks: dict[int, bytes]) -> bool:
        """Write blocks to the cache, and return whether it took all of them."""
        try:
            for number, block in blocks.items():
                if os.pwrite(opened.descriptor, block, number * BLOCK) < len(block):
                    return False  # the disk is full
                entry = _ENTRY.pack(zlib.crc32(block) | _PRESENT)
                os.pwrite(opened.descriptor, entry, self.size + _ENTRY.size * number)
                opened.verified[number] = 1
        except OSError as error:
            _warn(self.path.parent, error)
            return False
        return True


def open_files(addresses: Sequence[Address], folder: Path, limit: int) -> list[CachedFile]:
    """Ask for the sizes of remote files, and make room for them in the cache.

    Args:
        addresses: the files of a data set.
        folder: folder of the cache.
        limit: bytes that the cache may take. Files of other data sets, those not used for the longest time first, are
            removed for these.

    Raises:
        DataError: a file cannot be read, or the files are larger than the limit.
        OutputError: the folder cannot be written.
    """
    require_folder(folder, "data.cache")
    found: dict[int, Facts] = {}

    def ask(place: int, address: Address) -> None:
        found[place] = facts(address)

    in_parallel([partial(ask, place, address) for place, address in enumerate(addresses)])
    files = [CachedFile(address, found[place], folder) for place, address in enumerate(addresses)]
    make_room(folder, limit, files)
    return files


def make_room(folder: Path, limit: int, files: Sequence[CachedFile]) -> None:
    """Remove what was not used for the longest time, so that the cache can hold some files; see `open_files`.

    A process that still reads a removed file goes on: it has the file open, or reads anew what it needs.
    """
    needed = sum(file.size for file in files)
    if needed > limit:
        raise DataError(
            f"The data take {needed:,} bytes, more than the {limit:,} of data.cache_limit: every epoch reads all of "
            "them in an order of its own, so the cache has to hold them. Raise data.cache_limit, or choose a larger "
            "disk with data.cache=FOLDER."
        )
    kept = {file.path for file in files}
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "room.lock"):
            for path in kept:
                with suppress(OSError):
                    os.utime(path)
            states: list[tuple[float, int, Path]] = []
            for path in folder.glob("*.cached"):
                with suppress(OSError):
                    state = path.stat()
                    states += [(state.st_mtime, _taken(state), path)] if path not in kept else []
            total = needed + sum(taken for _, taken, _ in states)
            for _, taken, path in sorted(states):
                if total <= limit:
                    break
                with suppress(OSError):
                    path.unlink()
                    path.with_suffix(".lock").unlink(missing_ok=True)
                    total -= taken


def bring(ranges: Iterable[Range]) -> None:
    """Read what is missing of some parts of files into the cache, with several requests at the same time."""
    missing: dict[CachedFile, set[int]] = {}
    for file, start, length in ranges:
        missing.setdefault(file, set()).update(file.missing(start, length))
    actions: list[Callable[[], object]] = []
    for file, numbers in missing.items():
        actions += [partial(file.bring, first, last) for first, last in _runs(sorted(numbers))]
    in_parallel(actions)


def _runs(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the first and last of runs of ascending numbers, none of them longer than a request should be."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1 and number - runs[-1][0] < _RUN:
            runs[-1] = runs[-1][0], number
        else:
            runs.append((number, number))
    return runs


def _taken(state: os.stat_result) -> int:
    """Return the bytes that a file takes on the disk, without its holes."""
    blocks: Any = getattr(state, "st_blocks", None)
    return state.st_size if blocks is None else min(state.st_size, 512 * int(blocks))


said_once = threading.Event()


def _warn(folder: Path, error: OSError) -> None:
    """Say once in a process that the cache cannot be written; data are then read from afar whenever they are needed."""
    if not said_once.is_set():
        said_once.set()
        warnings.warn(
            f"The cache {folder} cannot be written ({error.strerror or error}); data are read from afar again and "
            "again: make room, or choose another data.cache.",
            stacklevel=2,
        )
