"""Read parts of files from a web server. The standard library does it; fsspec would need another package."""

from __future__ import annotations

import re
from http.client import HTTPResponse, InvalidURL
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tokdyn.data.remote.facts import Facts, FinalError

_TIMEOUT = 30.0  # seconds without a byte after which a connection is given up
_LATER = frozenset({408, 425, 429, *range(500, 600)})  # answers that say that a later try may succeed
_RANGE = re.compile(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})")
_REASONS = {
    401: "wants a name and password: check the address and its signature",
    403: "must not be read: check the address and its signature",
    404: "does not exist: correct the address, or put the file back",
    410: "does not exist any more: correct the address, or put the file back",
}


class HttpStore:
    """Files of web servers that answer requests for parts of a file."""

    def facts(self, url: str) -> Facts:
        """Return size and version; see `Store`. A request for one byte is allowed where one for the head is not."""
        with _request(url, 0, 1) as answer:
            return Facts(_total(answer), _version(answer))

    def read(self, url: str, start: int, stop: int, version: str) -> bytes:
        """Return a part; see `Store`."""
        with _request(url, start, stop) as answer:
            if _version(answer) != version:
                raise FinalError("changed while it was read: run the command again")
            _total(answer)
            received, missing = [], stop - start
            while missing and (piece := answer.read1(missing)):  # keeps what came before a connection breaks
                received.append(piece)
                missing -= len(piece)
        return b"".join(received)

    def names(self, url: str) -> list[str]:
        """Refuse: web servers do not list folders."""
        raise FinalError(
            "is on a web server, which does not list folders: name the files, as in data.path=https://HOST/{000..010}.tar"
        )


def _request(url: str, start: int, stop: int) -> HTTPResponse:
    """Request the bytes start .. stop - 1 of a file."""
    headers = {"User-Agent": "tokdyn", "Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
    try:
        answer: HTTPResponse = urlopen(Request(url, headers=headers), timeout=_TIMEOUT)
    except HTTPError as error:
        error.close()
        if error.code in _LATER:
            raise OSError(f"the server answers {error.code} {error.reason}") from error
        raise FinalError(_REASONS.get(error.code, f"cannot be read: the server answers {error.code}")) from error
    except (ValueError, InvalidURL) as error:  # its text may hold the signature
        raise FinalError(
            "is no address of a file: check host and port, and write spaces and letters beyond ASCII as in %20"
        ) from error
    return answer


def _total(answer: HTTPResponse) -> int:
    """Return the size of the whole file that a part was requested of."""
    found = _RANGE.fullmatch(answer.headers.get("Content-Range") or "")
    if answer.status != 206 or found is None:
        raise FinalError(
            "is on a web server that sends whole files only (it ignores Range): use another server, or download it"
        )
    return int(found[3])


def _version(answer: HTTPResponse) -> str:
    """Return what the server says about the version of the file."""
    return answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
