"""Open images by a path, a pattern or an address."""

from __future__ import annotations

import zipfile
from pathlib import Path

from tokdyn.data.config import CACHE_LIMIT
from tokdyn.data.ranges import LocalFile
from tokdyn.data.remote.addresses import Address, expand, has_braces, is_address
from tokdyn.data.remote.sources import open_remote_source
from tokdyn.data.sources import EXTENSIONS, INDEX, TAR, FolderSource, Source, ZipSource
from tokdyn.data.tars.source import TarSource
from tokdyn.errors import DataError
from tokdyn.files import user_path
from tokdyn.limits import SHARDS


def open_source(path: str | Path, cache: Path | None = None, cache_limit: int = CACHE_LIMIT) -> Source:
    """Open a folder, a zip, a folder inside a zip (`pictures.zip/train`), or tar shards (`{000..010}.tar`).

    Args:
        path: path of the images, or an address such as s3://bucket/pictures.zip.
        cache: folder in which parts of remote files are kept; None takes that of `tokdyn.data.remote`.
        cache_limit: bytes that it may take.

    Returns:
        The source of the files.

    Raises:
        DataError: nothing exists at the path, or it is none of these.
    """
    if is_address(path):
        return open_remote_source(Address(str(path)), cache, cache_limit)
    path = user_path(path)
    try:
        if tars := local_tars(path):
            return TarSource(path, [LocalFile(tar) for tar in tars])
        if path.is_dir():
            return FolderSource(path)
        archive = next((place for place in (path, *path.parents) if place.is_file()), None)
        if archive is not None:
            with archive.open("rb") as file:
                if not zipfile.is_zipfile(file):
                    raise DataError(f"{archive} is neither a folder nor a zip file: give a folder of images or a .zip.")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    if archive is not None:
        return ZipSource(archive, path.relative_to(archive).as_posix() if archive != path else "")
    raise DataError(f"There is no file or folder {path}: give the path of a folder or zip of images.")


def local_tars(path: Path) -> list[Path]:
    """Return the tars that a path names: one, those of a pattern, or those in a folder that holds nothing else to read.

    Raises:
        DataError: a tar of a pattern does not exist.
        OSError: the folder cannot be listed.
    """
    if path.is_dir():
        found = sorted(each for each in path.iterdir() if not each.name.startswith("."))
        tars = [each for each in found if each.suffix.lower() == TAR and each.is_file()]
        others = any(each.is_dir() or each.suffix.lower() in EXTENSIONS or each.name == INDEX for each in found)
        if excess := SHARDS.excess(len(tars)):
            raise DataError(f"{path} has {excess}.")
        return [] if others else tars
    if path.suffix.lower() != TAR:
        return []
    if path.exists():
        return [path]
    if not has_braces(path):
        return []
    tars = [Path(each) for each in expand(path)]
    if gone := [str(tar) for tar in tars if not tar.exists()]:
        raise DataError(
            f"{len(gone)} of {len(tars)} files of {path} do not exist, such as {gone[0]}: correct the pattern."
        )
    return tars
