"""Tell addresses of remote files, such as s3://bucket/folder, from local paths, and expand patterns with braces."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tokdyn.errors import DataError
from tokdyn.limits import SHARDS
from tokdyn.reading import one_line

PACKAGES = {
    "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs", "oss": "ossfs",
    "hf": "huggingface_hub", "http": "", "https": "", "memory": "", "file": "",
}  # fmt: skip
"""Protocols of addresses, each with the package that it needs beside fsspec."""

_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")


@dataclass(frozen=True)
class Address:
    """The address of a remote file or folder. As text, for messages, it leaves out passwords and signatures.

    Attributes:
        url: the address as it was given.
    """

    url: str

    def __post_init__(self) -> None:
        if self.protocol not in PACKAGES or "::" in self.url:
            raise DataError(
                f"{self} is no address that data are read from: give one that begins with "
                f"{', '.join(f'{name}://' for name in PACKAGES)}, or a local path."
            )

    @property
    def protocol(self) -> str:
        """The part in front of `://`, in small letters."""
        return self.url.partition("://")[0].lower()

    @property
    def name(self) -> str:
        """The last part of the path."""
        return str(self).rstrip("/").rpartition("/")[2]

    def __str__(self) -> str:
        shown = self._parts()[0] if self.protocol.startswith("http") else self.url
        return one_line(re.sub(r"(://)[^/@]*@", r"\1", shown))

    def __truediv__(self, name: str) -> Address:
        path, query = self._parts() if self.protocol.startswith("http") else (self.url, "")
        return Address(f"{path.rstrip('/')}/{name}{query}")

    def _parts(self) -> tuple[str, str]:
        """Return the address without its query, and the query with its question mark."""
        path, mark, query = self.url.partition("?")
        return path, mark + query


def is_address(path: str | Path) -> bool:
    """Return whether a path of data is an address and not a local path. A Path, which joins slashes, never is."""
    return isinstance(path, str) and _ADDRESS.match(path) is not None


def has_braces(path: str | Path | Address) -> bool:
    """Return whether a path is a pattern such as `{000..010}.tar`."""
    return _BRACES.search(_text(path)) is not None


def expand(path: str | Path | Address) -> list[str]:
    """Return the paths that a pattern stands for: `{000..010}` counts, keeping leading zeros, and `{a,b}` lists.

    Raises:
        DataError: the braces hold neither, or stand for more files than the limit.
    """
    parts = _BRACES.split(_text(path))
    choices, total = list[Sequence[str]](), 1
    for place, part in enumerate(parts):
        count, names = _choices(part, str(path)) if place % 2 else (1, [part])
        total *= count
        if excess := SHARDS.excess(total):
            raise DataError(f"{one_line(str(path))} stands for {excess}.")
        choices.append(names)
    return ["".join(chosen) for chosen in product(*choices)]


def _choices(inner: str, pattern: str) -> tuple[int, Sequence[str]]:
    """Return how many texts the inside of braces stands for, and the texts themselves if they are not too many."""
    if found := _RANGE.fullmatch(inner):
        first, last = int(found[1]), int(found[2])
        if first > last:
            raise DataError(f"{one_line(pattern)} counts from {first} down to {last}: write the smaller number first.")
        count, width = last - first + 1, len(found[1]) if found[1].startswith("0") else 0
        few = SHARDS.excess(count) is None
        return count, [str(number).zfill(width) for number in range(first, last + 1)] if few else []
    if "," in inner:
        names = inner.split(",")
        return len(names), names
    raise DataError(
        f"{one_line(pattern)} has {{{one_line(inner, 40)}}}, expected numbers as in {{000..010}} or names, as {{a,b}}."
    )


def _text(path: str | Path | Address) -> str:
    """Return a path as it was given."""
    return path.url if isinstance(path, Address) else str(path)
