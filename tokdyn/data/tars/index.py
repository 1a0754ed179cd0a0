"""Find the samples in a tar, once: where each lies, its checksum and its label. The result is cached.

The files of a sample have the same path up to the first dot of the file name: `a/0001.jpg` and `a/0001.cls`. Its label
is the content of `.cls`, or what `.json` holds as `cls`, `label` or `class`: a number, or a name.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import zlib
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tokdyn.bases.download import cache_folder
from tokdyn.data.ranges import RangeFile, RangeReader
from tokdyn.data.remote.store import in_parallel
from tokdyn.data.sources import EXTENSIONS, hidden
from tokdyn.data.tars.headers import Entry, entries
from tokdyn.errors import DataError, OutputError
from tokdyn.files import replacing
from tokdyn.limits import ARCHIVE_ENTRIES, ARRAY_BYTES, CLASSES, IMAGE_BYTES, JSON_BYTES
from tokdyn.progress import progress
from tokdyn.reading import one_line, parse_json, printable, shown

ARRAY = ".npy"
_FORMAT = "1"  # of the cached index
_BUFFER = 2**20  # bytes
_CLASS_BYTES = 1024
_LABELS = ("cls", "label", "class")
_NUMBER = re.compile("[0-9]{1,10}")


@dataclass(frozen=True)
class TarIndex:
    """The images and arrays in a tar, in its order.

    Attributes:
        names: N paths in the tar.
        labels: N labels: `#3` is class number 3, `=cat` the class of that name, and an empty text none.
        places: (N, 3) int64: offset in the tar, size in bytes, and CRC-32.
    """

    names: tuple[str, ...]
    labels: tuple[str, ...]
    places: NDArray[np.int64]


def tar_indices(files: list[RangeFile]) -> list[TarIndex]:
    """Return the index of each tar. Tars that were not seen before, or have changed, are read once.

    Raises:
        DataError: a tar cannot be read.
    """
    found: dict[int, TarIndex] = {}
    with progress("Looking for samples in tars", len(files)) as advance:

        def look(number: int, file: RangeFile) -> None:
            found[number] = tar_index(file)
            advance(1)

        in_parallel([partial(look, number, file) for number, file in enumerate(files)])
    if excess := ARCHIVE_ENTRIES.excess(sum(len(index.names) for index in found.values())):
        raise DataError(f"{files[0]} and the tars beside it have {excess}.")
    return [found[number] for number in range(len(files))]


def tar_index(file: RangeFile) -> TarIndex:
    """Return the index of a tar from the cache, or read the tar. Of several processes, one reads it."""
    place = os.path.realpath(str(file)) if os.path.exists(str(file)) else str(file)
    key = hashlib.sha256(os.fsencode(f"{_FORMAT}\n{place}\n{file.size}\n{file.version}")).hexdigest()[:40]
    cache = cache_folder() / "tars" / f"{key}.safetensors"
    index = _cached(cache)
    if index is None:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(cache.with_suffix(".lock"))
            with lock:
                index = _cached(cache) or read_index(file)
                with suppress(OutputError), replacing(cache) as half:
                    _save(index, half)
        except OSError:  # without a cache it is read again the next time
            index = read_index(file)
    return index


def read_index(file: RangeFile) -> TarIndex:
    """Read a whole tar."""
    names, places, labels = list[str](), list[tuple[int, int, int]](), dict[str, str]()
    try:
        with io.BufferedReader(RangeReader(file), _BUFFER) as buffered:
            tar = cast(BinaryIO, buffered)
            for entry in entries(tar, file.size):
                if any(map(hidden, entry.name.split("/"))):
                    continue
                if _is_sample(entry.name):
                    if excess := ARCHIVE_ENTRIES.excess(len(names) + 1):
                        raise ValueError(f"it has {excess}")
                    names.append(entry.name)
                    places.append((entry.offset, entry.size, _checksum(tar, entry)))
                elif (label := _label(tar, entry, labels.get(sample_key(entry.name)))) is not None:
                    labels[sample_key(entry.name)] = label
    except ValueError as error:
        raise DataError(
            f"{file} cannot be read as a tar of samples ({one_line(error)}): write it anew, as a plain tar of files."
        ) from error
    of = tuple(labels.get(sample_key(name), "") for name in names)
    return TarIndex(tuple(names), of, np.array(places, dtype=np.int64).reshape(-1, 3))


def sample_key(name: str) -> str:
    """Return the path of a file up to the first dot of its name, which the files of a sample share."""
    folder, slash, file = name.rpartition("/")
    return f"{folder}{slash}{file.partition('.')[0]}"


def _is_sample(name: str) -> bool:
    """Return whether a file is an image or an array."""
    suffix = PurePosixPath(name).suffix.lower()
    return suffix in EXTENSIONS or suffix == ARRAY


def _checksum(tar: BinaryIO, entry: Entry) -> int:
    """Return the CRC-32 of a file in a tar."""
    limit = ARRAY_BYTES if entry.name.lower().endswith(ARRAY) else IMAGE_BYTES
    if excess := limit.excess(entry.size):
        raise ValueError(f"{printable(one_line(entry.name, 80))} has {excess}")
    check, left = 0, entry.size
    tar.seek(entry.offset)
    while left:
        block = tar.read(min(left, _BUFFER))
        check, left = zlib.crc32(block, check), left - len(block)
        if not block:
            raise ValueError("it has become shorter while it was read")
    return check


def _label(tar: BinaryIO, entry: Entry, known: str | None) -> str | None:
    """Return the label that a file gives to its sample; None if it gives none. That of `.cls` counts more."""
    kind = entry.name[len(sample_key(entry.name)) :].lower()
    if kind == ".cls":
        if entry.size > _CLASS_BYTES:
            raise ValueError(f"{printable(one_line(entry.name, 80))} has {entry.size:,} bytes, expected a class")
        tar.seek(entry.offset)
        text = tar.read(entry.size).decode("utf-8").strip()
        return _class_text(int(text) if _NUMBER.fullmatch(text) else text, entry.name)
    if kind != ".json" or known is not None:
        return None
    if excess := JSON_BYTES.excess(entry.size):
        raise ValueError(f"{printable(one_line(entry.name, 80))} has {excess}")
    tar.seek(entry.offset)
    try:
        content = parse_json(tar.read(entry.size))
    except ValueError as error:
        raise ValueError(f"{printable(one_line(entry.name, 80))} is no JSON: {one_line(error, 80)}") from error
    found = [content[key] for key in _LABELS if key in content] if isinstance(content, dict) else []
    return _class_text(found[0], entry.name) if found else None


def _class_text(value: object, name: str) -> str:
    """Return the class that a value names, as `TarIndex.labels` has it."""
    if type(value) is int and 0 <= value < CLASSES.value:
        return f"#{value}"
    if isinstance(value, str) and value.strip() and "\0" not in value and len(value) <= _CLASS_BYTES:
        return f"={value.strip()}"
    raise ValueError(
        f"{printable(one_line(name, 80))} gives the class {shown(value)}, expected a name or a number below "
        f"{CLASSES.value:,} ({CLASSES.variable})"
    )


def _save(index: TarIndex, path: Path) -> None:
    """Write an index to a file."""
    texts = {"names": index.names, "labels": index.labels}
    joined = {key: "\0".join(each).encode("utf-8", "surrogateescape") for key, each in texts.items()}
    save_file({"places": index.places} | {key: np.frombuffer(each, np.uint8) for key, each in joined.items()}, path)


def _cached(path: Path) -> TarIndex | None:
    """Return an index from a file; None if there is none, or it is damaged."""
    try:
        content = load_file(path)
        places = content["places"].reshape(-1, 3)
        texts = [content[key].tobytes().decode("utf-8", "surrogateescape").split("\0") for key in ("names", "labels")]
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    if not len(places):
        return TarIndex((), (), places)
    return TarIndex(tuple(texts[0]), tuple(texts[1]), places) if len(texts[0]) == len(texts[1]) == len(places) else None
