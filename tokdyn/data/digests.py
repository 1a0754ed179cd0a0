"""Compute the size and the CRC-32 of image files, by which it is noticed that their content was replaced.

Zips list both. The files of a folder are read once; what was found is cached with the size and the times of the file,
and a file is read again only if one of these has changed. The cache may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tokdyn.bases.download import cache_folder
from tokdyn.errors import OutputError
from tokdyn.files import replacing
from tokdyn.progress import progress

_BLOCK = 1 << 20  # bytes that are read at once
_CHUNK = 64  # files that a thread reads before it reports progress
_UNREADABLE = -1

Rows = NDArray[np.int64]


def folder_digests(root: Path, names: Sequence[str]) -> Rows:
    """Return the size and the CRC-32 (N, 2) of files in a folder; -1 where they cannot be read.

    Args:
        root: the folder.
        names: N paths relative to it.
    """
    states = _states(root, names)
    cache = cache_folder() / "digests" / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:32]}.safetensors"
    checks = _cached(cache, states)
    unknown = np.flatnonzero(checks == _UNREADABLE)
    if len(unknown):
        with progress(f"Reading {root.name} once, to notice later changes", len(unknown)) as advance:
            parts = [unknown[start : start + _CHUNK] for start in range(0, len(unknown), _CHUNK)]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                read = pool.map(lambda part: [_check(root / names[place]) for place in part], parts)
                for part, found in zip(parts, read, strict=True):
                    checks[part] = found
                    advance(len(part))
        with suppress(OutputError), replacing(cache) as half:  # without a cache they are read again the next time
            save_file({"states": states, "checks": checks}, half)
    return np.stack([states[:, 1], checks], axis=1)


def _states(root: Path, names: Sequence[str]) -> Rows:
    """Return (N, 4): a hash of the name, the size in bytes, and the times of the last change of content and of state.

    The time of the last change of state, which no program can set, tells a replaced file that keeps its other time.
    """
    rows = np.full((len(names), 4), _UNREADABLE, dtype=np.int64)
    for row, name in zip(rows, names, strict=True):
        digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
        row[0] = int.from_bytes(digest, "little", signed=True)
        with suppress(OSError):
            found = (root / name).stat()
            row[1:] = found.st_size, found.st_mtime_ns, found.st_ctime_ns
    return rows


def _cached(cache: Path, states: Rows) -> NDArray[np.int64]:
    """Return the cached CRC-32 (N,) of files that are in the state of the cache, and -1 for the others."""
    checks = np.full(len(states), _UNREADABLE, dtype=np.int64)
    try:
        content = load_file(cache)
        known, stored = content["states"], content["checks"]
        order = np.argsort(known[:, 0])
        places = order[np.searchsorted(known[order, 0], states[:, 0]).clip(max=len(known) - 1)]
    except (OSError, SafetensorError, KeyError, IndexError, ValueError):
        return checks  # there is none, or it is damaged
    same = (known[places] == states).all(axis=1)
    checks[same] = stored[places[same]]
    return checks


def _check(path: Path) -> int:
    """Return the CRC-32 of a file, or -1 if it cannot be read."""
    check = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                check = zlib.crc32(block, check)
    except OSError:
        return _UNREADABLE
    return check
