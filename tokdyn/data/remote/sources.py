"""Open remote images: a zip, or tar shards. Images that lie about as single objects are refused."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, cast

from tokdyn.bases.download import cache_folder
from tokdyn.data.ranges import RangeReader
from tokdyn.data.remote.addresses import Address, expand, has_braces
from tokdyn.data.remote.ahead import ReadAhead
from tokdyn.data.remote.cache import CachedFile, Range, bring, open_files
from tokdyn.data.remote.store import names
from tokdyn.data.sources import TAR, Source, ZipSource
from tokdyn.data.tars.source import TarSource
from tokdyn.errors import DataError
from tokdyn.limits import ARCHIVE_ENTRIES, SHARDS
from tokdyn.reading import one_line, require_size

_BUFFER = 2**16  # bytes
_ZIP = re.compile(r"(.+?\.zip)(?:/(.*))?", re.IGNORECASE | re.DOTALL)
_HEADER = 30 + 1024  # bytes in front of the content of a file in a zip: fixed ones, and extra fields


def default_cache() -> Path:
    """Return the folder in which parts of remote files are kept unless data.cache names another."""
    return cache_folder() / "data"


def open_remote_source(address: Address, cache: Path | None, cache_limit: int) -> Source:
    """Open remote images; see `tokdyn.data.opening.open_source`."""
    folder = cache or default_cache()
    if tars := remote_tars(address):
        return TarSource(address, open_files(tars, folder, cache_limit))
    if found := _zip_parts(address):
        (file,) = open_files([found[0]], folder, cache_limit)
        return RemoteZip(file, found[1])
    raise DataError(
        f"{address} is no zip, and holds no tars: put the images into a zip or into tars of some 1 GB each, because "
        "object storage is slow with many small files."
    )


def remote_tars(address: Address, instead: str | None = None) -> list[Address]:
    """Return the tars that an address names: one, those of a pattern, or those in a folder.

    Args:
        address: the address.
        instead: name of a file; a folder that holds it is no folder of tars.
    """
    base = address.url.partition("?")[0]
    if base.lower().endswith(TAR):
        return [Address(url) for url in expand(address)] if has_braces(address) else [address]
    if _zip_parts(address) or (instead and address.protocol in ("http", "https")):
        return []
    found = names(address)
    tars = [address / name for name in found if name.lower().endswith(TAR) and not name.startswith(".")]
    if excess := SHARDS.excess(len(tars)):
        raise DataError(f"{address} has {excess}.")
    return [] if instead in found else tars


def _zip_parts(address: Address) -> tuple[Address, str] | None:
    """Return the address of the zip that an address names, and the folder in it; None if it names no zip."""
    path, mark, query = address.url.partition("?")
    found = _ZIP.fullmatch(path)
    return None if found is None else (Address(found[1] + mark + query), found[2] or "")


class RemoteZip(ZipSource):
    """The image files in a remote zip, or in one folder of it. Only the parts that are needed are read."""

    def __init__(self, file: CachedFile, folder: str = "") -> None:
        """Describe the archive.

        Args:
            file: the zip.
            folder: folder in the archive that is taken as the root; "" takes the archive itself.
        """
        super().__init__(cast(Path, file.address), folder)
        self._file = file
        self._ahead = ReadAhead([file])

    def bring(self, names: Sequence[str]) -> None:
        """Bring files that are read next into the cache."""
        bring(self._ranges(names))

    def read_ahead(self, names: Callable[[], Sequence[str]], share: float) -> None:
        """Begin to read files of a later batch; see `Dataset.read_ahead`."""
        self._ahead.ask(lambda: bring(self._ranges(names())), share)

    def _ranges(self, names: Sequence[str]) -> list[Range]:
        """Return where some files lie in the zip."""
        entries = [self._open().getinfo(self.folder + name) for name in names]
        found = []
        for entry in entries:
            length = entry.compress_size + len(entry.filename) + _HEADER
            start = max(0, min(entry.header_offset, self._file.size))
            found.append((self._file, start, min(length, self._file.size - start)))
        return found

    def _archive_file(self) -> zipfile.ZipFile:
        """Open the archive; see `ZipSource`."""
        reader = io.BufferedReader(RangeReader(self._file), _BUFFER)
        try:
            archive = zipfile.ZipFile(cast(IO[bytes], reader))
        except (OSError, DataError):
            raise
        except Exception as error:  # a damaged directory of entries can raise anything
            raise zipfile.BadZipFile(one_line(error) or type(error).__name__) from error
        require_size(self.path, len(archive.filelist), ARCHIVE_ENTRIES)
        return archive
