"""Download a public file with a progress bar, resume interrupted downloads, and check the digest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from functools import lru_cache
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from filelock import FileLock

from tokdyn.errors import CheckpointError
from tokdyn.files import half_of, replacing, writing
from tokdyn.progress import progress

_CHUNK = 1 << 20  # bytes that are read at once; the unit of the progress bar
_TRIES = 3
_TIMEOUT = 30.0  # seconds without a byte after which a connection is given up


class Unreachable(Exception):
    """Raised if the server cannot be reached, or if downloads are turned off."""


def cache_folder() -> Path:
    """Return the folder of downloaded files: the environment variable TOKDYN_CACHE, or ~/.cache/tokdyn."""
    return Path(os.environ.get("TOKDYN_CACHE") or Path.home() / ".cache" / "tokdyn").expanduser()


def fetch(url: str, place: Path, sha256: str | None = None) -> str:
    """Download a file, unless it exists.

    The digest is written to PLACE.sha256 in the format of `sha256sum`, and a file that exists is checked against it. An
    interrupted download is kept as PLACE.part; the next call resumes it if the server still has the same file.

    Args:
        url: http or https URL of the file.
        place: path to write the file to.
        sha256: expected digest; None accepts any file on the first download.

    Returns:
        The sha256 of the file.

    Raises:
        CheckpointError: the server does not have the file, the connection breaks repeatedly, or the digest is wrong.
        OutputError: the file cannot be written.
        Unreachable: the server cannot be reached.
    """
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):
        if place.is_file():
            return _check_existing(place, sha256)
        part = place.with_name(f"{place.name}.part")
        _complete(url, part, place.name)
        actual = digest(part)
        if sha256 is not None and actual != sha256:
            part.unlink()
            raise CheckpointError(
                f"{url} sent a file with the sha256 {actual}, expected {sha256}; it was removed. Try again, or get the "
                "file from elsewhere and give its path."
            )
        with replacing(_digest_file(place)) as temporary:
            temporary.write_text(f"{actual}  {place.name}\n")
        with writing(place):
            part.replace(place)
            _version_file(part).unlink(missing_ok=True)
        return actual


def digest(path: Path) -> str:
    """Compute the sha256 of a file in hexadecimal."""
    status = path.stat()
    return _digest(path.absolute(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, modified: int) -> str:
    """Compute the sha256, cached until size or time of the file change, because large files take seconds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_existing(place: Path, sha256: str | None) -> str:
    """Return the digest of a file that exists; raise a CheckpointError unless it is the expected one."""
    note = _digest_file(place)
    expected = sha256 or (note.read_text().split(maxsplit=1)[0] if note.is_file() and note.stat().st_size else None)
    actual = digest(place)
    if expected not in (None, actual):
        raise CheckpointError(
            f"{place} has the sha256 {actual}, expected {expected}: it changed after it was downloaded; remove it, and "
            "it will be downloaded again."
        )
    if expected is None:  # the user put the file there, so it must not change from now on
        with replacing(note) as temporary:
            temporary.write_text(f"{actual}  {place.name}\n")
    return actual


def _digest_file(place: Path) -> Path:
    """Return the path of the file that holds the digest of a downloaded file."""
    return place.with_name(f"{place.name}.sha256")


def _version_file(part: Path) -> Path:
    """Return the path of the file that holds the server's tag of the version that a partial download is part of."""
    return half_of(part).with_suffix(".json")


def _complete(url: str, part: Path, name: str) -> None:
    """Download the missing bytes of a partial file, in a few attempts.

    Args:
        url: URL of the file.
        part: path of the partial file, which may not exist yet.
        name: name of the file, for the progress bar.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise Unreachable("HF_HUB_OFFLINE is set")
    reason = ""
    for _ in range(_TRIES):
        try:
            done, total = _resume(url, part, name)
        except HTTPError as error:
            if error.code == 416:  # the part is longer than the file, so it belongs to another version
                part.unlink(missing_ok=True)
                continue
            raise CheckpointError(f"{url} answers {error.code} {error.reason}; get the file from elsewhere.") from error
        except URLError as error:
            raise Unreachable(str(error.reason)) from error
        except (HTTPException, ConnectionError, TimeoutError) as error:
            reason = str(error) or type(error).__name__
            continue
        if total is None or done == total:
            return
        reason = f"{done} of {total} bytes arrived"
    raise CheckpointError(
        f"the download of {url} broke off {_TRIES} times ({reason}); call again to resume it from {part}."
    )


def _resume(url: str, part: Path, name: str) -> tuple[int, int | None]:
    """Request the missing bytes and append them to the partial file.

    Returns:
        The size of the partial file now, and that of the complete file (None if the server does not say).
    """
    have, version = part.stat().st_size if part.is_file() else 0, _version(part)
    headers = {"User-Agent": "tokdyn", "Accept-Encoding": "identity"}
    if have and version:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    with urlopen(Request(url, headers=headers), timeout=_TIMEOUT) as answer:
        kind = answer.headers.get("Content-Type", "")
        if kind.startswith("text/html"):
            raise CheckpointError(f"{url} answers with a web page instead of a file; get the file from elsewhere.")
        if answer.status != 206:
            have = 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        with writing(part):
            tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            # A weak tag promises that two versions are equivalent, not that their bytes are equal, so it is not stored.
            _version_file(part).write_text(json.dumps("" if tag.startswith("W/") else tag))
            file = part.open("ab" if have else "wb")
        with file, progress(f"{name}, MiB", -(-(total or 0) // _CHUNK)) as advance:
            return have + _append(answer, file, part, advance, have), total


def _append(answer: HTTPResponse, file: BinaryIO, part: Path, advance: Callable[[int], None], have: int) -> int:
    """Append the body of an answer to a file, and return the number of bytes.

    Args:
        answer: the server's answer.
        file: the opened file.
        part: path of the file, for error messages.
        advance: moves the progress bar by a number of MiB.
        have: bytes that were downloaded before.
    """
    advance(have // _CHUNK)
    received = 0
    while block := answer.read(_CHUNK):
        with writing(part):
            file.write(block)
        received += len(block)
        advance(1)
    with writing(part):
        file.flush()
    return received


def _version(part: Path) -> str:
    """Return the server's tag of the version that a partial download is part of; "" if it is unknown."""
    try:
        return str(json.loads(_version_file(part).read_text()))
    except (OSError, ValueError):
        return ""
