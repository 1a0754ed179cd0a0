"""Downloads from a real server: complete, interrupted, changed, wrong, absent, and without a network."""

from __future__ import annotations

import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tokdyn.bases.download import Unreachable, fetch
from tokdyn.errors import CheckpointError, OutputError

CONTENT = bytes(range(256)) * 20_000  # 5 MB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Server:
    """A server's file and behaviour, and the requests it got.

    Attributes:
        url: URL of the file.
        content: its bytes.
        tag: its ETag; "" sends none.
        kind: its content type.
        cuts: the next answers end after these numbers of bytes.
        ranges: requested ranges, None for whole files.
    """

    url: str = ""
    content: bytes = CONTENT
    tag: str = '"one"'
    kind: str = "application/octet-stream"
    cuts: list[int] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/model.pt":
                self.send_error(404)
                return
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            begin = 0
            if asked and self.headers.get("If-Range") == state.tag:
                begin = int(re.fullmatch(r"bytes=(\d+)-", asked)[1])  # type: ignore[index]
            body = state.content[begin:]
            self.send_response(206 if begin else 200)
            self.send_header("Content-Type", state.kind)
            self.send_header("Content-Length", str(len(body)))
            if state.tag:
                self.send_header("ETag", state.tag)
            self.end_headers()
            self.wfile.write(body[: state.cuts.pop(0)] if state.cuts else body)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        state.url = f"http://127.0.0.1:{serving.server_port}/model.pt"
        yield state
        serving.shutdown()
        thread.join()


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("sha256", [None, DIGEST])
def test_file_is_downloaded_once(server: Server, tmp_path: Path, sha256: str | None) -> None:
    place = tmp_path / "cache" / "model.pt"
    assert fetch(server.url, place, sha256) == DIGEST
    assert place.read_bytes() == CONTENT
    assert (tmp_path / "cache" / "model.pt.sha256").read_text() == f"{DIGEST}  model.pt\n"
    assert fetch(server.url, place, sha256) == DIGEST
    assert server.ranges == [None]
    assert files_in(tmp_path / "cache") == ["model.pt", "model.pt.sha256"]


def test_interrupted_download_is_resumed(server: Server, tmp_path: Path) -> None:
    server.cuts = [3_000_000, 1_000_000]
    assert fetch(server.url, tmp_path / "model.pt") == DIGEST
    assert server.ranges == [None, "bytes=3000000-", "bytes=4000000-"]
    assert files_in(tmp_path) == ["model.pt", "model.pt.sha256"]


def test_next_call_resumes_an_abandoned_download(server: Server, tmp_path: Path) -> None:
    server.cuts = [1_000_000, 1, 1]
    with pytest.raises(CheckpointError, match=r"3 .*1000002 of 5120000.*model\.pt\.part"):
        fetch(server.url, tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()
    assert fetch(server.url, tmp_path / "model.pt") == DIGEST
    assert server.ranges[-1] == "bytes=1000002-"


def test_another_version_on_the_server_is_downloaded_from_the_start(server: Server, tmp_path: Path) -> None:
    server.cuts = [1_000_000, 0, 0]
    with pytest.raises(CheckpointError, match=r"model\.pt\.part"):
        fetch(server.url, tmp_path / "model.pt")
    server.content, server.tag = CONTENT[::-1], '"two"'
    assert fetch(server.url, tmp_path / "model.pt") == hashlib.sha256(CONTENT[::-1]).hexdigest()
    assert (tmp_path / "model.pt").read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize("tag", ["", 'W/"weak"'])
def test_downloads_without_a_strong_tag_are_not_resumed(server: Server, tmp_path: Path, tag: str) -> None:
    server.tag, server.cuts = tag, [1_000_000]
    assert fetch(server.url, tmp_path / "model.pt") == DIGEST
    assert server.ranges == [None, None]


def test_wrong_digest_is_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{DIGEST}.*{'0' * 64}"):
        fetch(server.url, tmp_path / "model.pt", "0" * 64)
    assert not (tmp_path / "model.pt").exists()
    assert not (tmp_path / "model.pt.part").exists()


def test_file_that_changed_after_its_download_is_refused(server: Server, tmp_path: Path) -> None:
    fetch(server.url, tmp_path / "model.pt")
    (tmp_path / "model.pt").write_bytes(CONTENT[:-1])
    with pytest.raises(CheckpointError, match=rf"model\.pt .*{DIGEST}"):
        fetch(server.url, tmp_path / "model.pt")


def test_file_placed_by_hand_is_used(server: Server, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"mine")
    assert fetch(server.url, tmp_path / "model.pt") == hashlib.sha256(b"mine").hexdigest()
    assert server.ranges == []
    with pytest.raises(CheckpointError, match=DIGEST):
        fetch(server.url, tmp_path / "model.pt", DIGEST)


def test_missing_files_and_web_pages_are_refused(server: Server, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="404 Not Found"):
        fetch(server.url.replace("model", "nothing"), tmp_path / "model.pt")
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(CheckpointError, match=r"model\.pt .*web page"):
        fetch(server.url, tmp_path / "model.pt")
    assert files_in(tmp_path) == []


def test_unreachable_servers(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # a port at which nobody listens
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(Unreachable, match="refused"):
            fetch(f"http://127.0.0.1:{taken.getsockname()[1]}/model.pt", tmp_path / "model.pt")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE"):
        fetch(server.url, tmp_path / "model.pt")
    assert server.ranges == []


def test_concurrent_calls_download_once(server: Server, tmp_path: Path) -> None:
    digests: list[str] = []
    threads = [threading.Thread(target=lambda: digests.append(fetch(server.url, tmp_path / "m.pt"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests == [DIGEST] * 4
    assert server.ranges == [None]


def test_unwritable_cache_is_refused(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file.model\.pt"):
        fetch(server.url, tmp_path / "file" / "model.pt")
