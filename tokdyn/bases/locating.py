"""Find the files of a pretrained model by path, name or hub id, and download them if necessary. It loads no torch."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import constants

from tokdyn.bases.download import Unreachable, cache_folder, fetch
from tokdyn.bases.hub import fetch_from_hub
from tokdyn.bases.names import check_name, suggestion
from tokdyn.bases.table import Row, rows, shipped_folder
from tokdyn.errors import CheckpointError
from tokdyn.files import user_path


def locate(name: str, local: bool = False) -> tuple[Path, Row | None]:
    """Return the path of a base, downloading it if necessary, and its row in the table of listed bases.

    Args:
        name: the base, as for `tokdyn.bases.read_base`.
        local: do not download.

    Returns:
        The path of the file or folder, and the row; None for a path or a hub id.

    Raises:
        CheckpointError: there is no such base, or it is not in the cache and cannot be downloaded.
    """
    path = user_path(name)
    if name and path.exists():
        return path, None
    check_name(name)
    row = rows().get(name)
    place = name if row is None else row.place
    try:
        if row is not None and row.source == "shipped":
            return shipped_folder(row.place), row
        if row is not None and row.source == "url":
            return _public_file(row, local), row
        return fetch_from_hub(place, local), row
    except Unreachable as reason:
        shipped = [each.name for each in rows().values() if each.source == "shipped"]
        alternatives = f"use a base that ships with tokdyn ({', '.join(shipped) or 'this installation has none'})"
        raise CheckpointError(
            f"{name} cannot be downloaded ({reason}){suggestion(name) if row is None else ''}: give the path of "
            f"a file or folder on this machine, copy a filled cache ({_cache(row)}) from another one, or "
            f"{alternatives}."
        ) from reason


def in_cache(row: Row) -> bool:
    """Return whether a base can be opened without a network."""
    try:
        locate(row.name, local=True)
    except CheckpointError:
        return False
    return True


def _public_file(row: Row, local: bool) -> Path:
    """Return the path of a public file, after downloading it if necessary and not forbidden by `local`."""
    file = cache_folder() / row.file
    if local:
        if not file.is_file():
            raise Unreachable("downloads are off")
        return file
    fetch(row.place, file, row.sha256)
    return file


def _cache(row: Row | None) -> str:
    """Return the path of the cache that holds a base: the file of a public URL, or the cache of the hub."""
    if row is not None and row.source == "url":
        return str(cache_folder() / row.file)
    return str(constants.HF_HUB_CACHE)
