"""Downloading a public file: with progress, taken up where it broke off, checked, and there whole or not at all."""

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

_CHUNK = 1 << 20  # bytes; progress counts these
_TRIES = 3
_TIMEOUT = 30.0  # seconds without a byte


class Unreachable(Exception):
    """There is no way to the server, or none is allowed."""


def cache_folder() -> Path:
    """Where downloaded files are kept: TOKDYN_CACHE, or ~/.cache/tokdyn."""
    return Path(os.environ.get("TOKDYN_CACHE") or Path.home() / ".cache" / "tokdyn").expanduser()


def fetch(url: str, place: Path, sha256: str | None = None) -> str:
    """Download a file unless it is there.

    Its digest is written beside it, as `sha256sum` does, and a file that is there is compared with that. While it is
    on its way it is called PLACE.part; a next call goes on from there, if the server still has the same file.

    Args:
        url: http or https.
        place: of the file.
        sha256: what it has to be; None takes what comes first for it.

    Returns:
        Its sha256.

    Raises:
        CheckpointError: the server does not have it, it breaks off again and again, or the digest is another.
        OutputError: it cannot be written.
        Unreachable: there is no way to the server.
    """
    with writing(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):
        if place.is_file():
            return _checked(place, sha256)
        part = place.with_name(f"{place.name}.part")
        _complete(url, part, place.name)
        found = digest(part)
        if sha256 is not None and found != sha256:
            part.unlink()
            raise CheckpointError(
                f"what {url} sent has the sha256 {found}, expected {sha256}; it was removed. Try again, or get the "
                "file from elsewhere and give its path."
            )
        with replacing(_note(place)) as half:
            half.write_text(f"{found}  {place.name}\n")
        with writing(place):
            part.replace(place)
            _tag(part).unlink(missing_ok=True)
        return found


def digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    now = path.stat()
    return _digest(path.absolute(), now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, changed: int) -> str:
    """Read once as long as the file does not change: weights of gigabytes take seconds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(place: Path, sha256: str | None) -> str:
    """The digest of a file that is there already."""
    note = _note(place)
    expected = sha256 or (note.read_text().split(maxsplit=1)[0] if note.is_file() and note.stat().st_size else None)
    found = digest(place)
    if expected not in (None, found):
        raise CheckpointError(
            f"{place} has the sha256 {found}, expected {expected}: it was changed after it was downloaded; remove it, "
            "and it will be downloaded again."
        )
    if expected is None:  # put there by hand: from now on it is to stay what it is
        with replacing(note) as half:
            half.write_text(f"{found}  {place.name}\n")
    return found


def _note(place: Path) -> Path:
    return place.with_name(f"{place.name}.sha256")


def _tag(part: Path) -> Path:
    """Where it says which version of the file a part is of."""
    return half_of(part).with_suffix(".json")


def _complete(url: str, part: Path, name: str) -> None:
    """Bring a part to its full length."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise Unreachable("HF_HUB_OFFLINE is set")
    reason = ""
    for _ in range(_TRIES):
        try:
            done, total = _go_on(url, part, name)
        except HTTPError as error:
            if error.code == 416:  # the part is longer than the file: not of this version
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
        reason = f"{done} of {total} bytes came"
    raise CheckpointError(f"{url} broke off {_TRIES} times ({reason}); what came is kept, so that a next call goes on.")


def _go_on(url: str, part: Path, name: str) -> tuple[int, int | None]:
    """Ask for what is missing and append it; how many bytes are there then, and how many there should be."""
    have, version = part.stat().st_size if part.is_file() else 0, _version(part)
    headers = {"User-Agent": "tokdyn", "Accept-Encoding": "identity"}
    if have and version:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    with urlopen(Request(url, headers=headers), timeout=_TIMEOUT) as answer:
        kind = answer.headers.get("Content-Type", "")
        if kind.startswith("text/html"):
            raise CheckpointError(f"{url} answers with a web page, not with a file; get the file from elsewhere.")
        if answer.status != 206:
            have = 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else have + int(length)
        with writing(part):
            tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            # A weak tag says that two versions mean the same, not that their bytes are equal.
            _tag(part).write_text(json.dumps("" if tag.startswith("W/") else tag))
            file = part.open("ab" if have else "wb")
        with file, progress(f"{name}, MiB", -(-(total or 0) // _CHUNK)) as advance:
            return have + _copied(answer, file, part, advance, have), total


def _copied(answer: HTTPResponse, file: BinaryIO, part: Path, advance: Callable[[int], None], have: int) -> int:
    """Write what comes, until nothing more does."""
    advance(have // _CHUNK)
    came = 0
    while block := answer.read(_CHUNK):
        with writing(part):
            file.write(block)
        came += len(block)
        advance(1)
    with writing(part):
        file.flush()
    return came


def _version(part: Path) -> str:
    try:
        return str(json.loads(_tag(part).read_text()))
    except (OSError, ValueError):
        return ""
