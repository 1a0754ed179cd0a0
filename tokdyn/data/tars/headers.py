"""List the files in an uncompressed tar. Nothing is unpacked; what a tar of samples has no use for is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from tokdyn.limits import TAR_HEADER_BYTES
from tokdyn.reading import one_line, printable

_BLOCK = 512  # bytes; headers and contents begin at multiples of it
_PADDING = 2**20  # bytes behind the end; tar writes 10 KiB unless it is told otherwise
_FILES = (b"0", b"\0", b"7")
_REFUSED = {
    b"1": "a link", b"2": "a link", b"K": "a link", b"3": "a device", b"4": "a device", b"6": "a named pipe",
    b"S": "a sparse file",
}  # fmt: skip
_PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"(\xb5": "zstandard"}


@dataclass(frozen=True)
class Entry:
    """A file in a tar.

    Attributes:
        name: its path in the tar.
        offset: place of its first byte in the tar.
        size: in bytes.
    """

    name: str
    offset: int
    size: int


def entries(tar: BinaryIO, size: int) -> Iterator[Entry]:
    """Yield the files in a tar. The caller may read their contents between two of them.

    Args:
        tar: the tar, opened.
        size: its size in bytes.

    Raises:
        ValueError: it is damaged, or holds something other than files and folders. Its text is the reason.
    """
    place, long_name, extended = 0, None, dict[str, str]()
    seen = set[str]()
    while True:
        tar.seek(place)
        header = tar.read(_BLOCK)
        if len(header) < _BLOCK:
            raise ValueError("it is cut off: its end is missing" if place else "it is no tar, and too short for one")
        place += _BLOCK
        if not any(header):
            _require_end(tar, size - place)
            return
        kind, length = _checked(header, first=place == _BLOCK)
        if kind in (b"L", b"x", b"g"):
            if excess := TAR_HEADER_BYTES.excess(length):
                raise ValueError(f"a header has {excess}")
            text = tar.read(length)
            if len(text) < length:
                raise ValueError("it is cut off in a header")
            if kind == b"L":
                long_name = _text(text)
            elif kind == b"x":
                extended = _records(text)
            elif {"path", "size"} & set(_records(text)):
                raise ValueError("one header gives the name or size of all entries")
            place += _padded(length)
            continue
        name = extended.get("path") or long_name or _name(header)
        length = _decimal(extended["size"]) if "size" in extended else length
        if kind in _REFUSED or any(key.startswith("GNU.sparse") for key in extended):
            raise ValueError(
                f"{_shown(name)} is {_REFUSED.get(kind, 'a sparse file')}; a tar of samples holds files only"
            )
        long_name, extended = None, {}
        folder = kind == b"5" or (kind == b"\0" and name.endswith("/"))
        if not folder and kind not in _FILES:
            raise ValueError(f"{_shown(name)} is of the unknown kind {kind!r}")
        if place + length > size:
            raise ValueError(f"it is cut off: {_shown(name)} ends {place + length - size:,} bytes behind its end")
        if not folder:
            name = _plain(name)
            if name in seen:
                raise ValueError(f"{_shown(name)} is in it twice")
            seen.add(name)
            yield Entry(name, place, length)
        place += _padded(length)


def _checked(header: bytes, first: bool) -> tuple[bytes, int]:
    """Return the kind and the size of an entry; raise a ValueError unless the checksum of its header is right."""
    stored = _number(header[148:156])
    if stored != sum(header[:148]) + 8 * ord(" ") + sum(header[156:]):
        if first:
            packed = next((name for magic, name in _PACKED.items() if header.startswith(magic)), None)
            raise ValueError(
                f"it is compressed with {packed}, and only plain tars can be read in any order"
                if packed
                else "it is no tar"
            )
        raise ValueError("a header does not match its checksum")
    size = _number(header[124:136])
    if size is None:
        raise ValueError("the size of an entry is no number")
    return header[156:157], size


def _number(field: bytes) -> int | None:
    """Return the number in a field of a header, in octal digits or, if it is large, in binary; None if it is none."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if all(digit in b"01234567" for digit in digits) else None


def _name(header: bytes) -> str:
    """Return the name in a header; POSIX puts the first part of a long one elsewhere."""
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _records(text: bytes) -> dict[str, str]:
    """Return the records of an extended header, each of which is `LENGTH KEY=VALUE` and a line feed."""
    records, place = dict[str, str](), 0
    while place < len(text) and text[place]:
        digits, space, _ = text[place : place + 20].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        key, equals, value = text[place + len(digits) + 1 : place + length].partition(b"=")
        if place + length > len(text) or not equals or not value.endswith(b"\n"):
            raise ValueError("an extended header is damaged")
        records[key.decode("utf-8", "replace")] = _text(value[:-1])
        place += length
    return records


def _decimal(text: str) -> int:
    """Return the size that an extended header gives."""
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise ValueError(f"the size {_shown(text)} of an entry is no number")
    return int(text)


def _plain(name: str) -> str:
    """Return the path of a file without `./`; raise a ValueError if it leads out of the tar."""
    parts = [part for part in name.split("/") if part != "."]
    if name.startswith("/") or not all(parts) or ".." in parts:
        raise ValueError(f"{_shown(name) or 'an empty name'} is no path within it")
    return "/".join(parts)


def _require_end(tar: BinaryIO, left: int) -> None:
    """Raise a ValueError if something follows the end, such as another tar, whose samples would be missed."""
    if left > _PADDING or any(tar.read(left)):
        raise ValueError(f"{left:,} bytes follow its end, perhaps of another tar: give each tar a file of its own")


def _text(field: bytes) -> str:
    """Return the text in a field, which ends at the first NUL."""
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _shown(name: str) -> str:
    """Return a name for a message."""
    return printable(one_line(name, 80))


def _padded(length: int) -> int:
    """Return the bytes that a content takes, up to the next header."""
    return -(-length // _BLOCK) * _BLOCK
