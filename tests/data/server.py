"""A web server on this machine that answers requests for parts of files, with faults on demand."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

Fault = Callable[[int, str], str]
"""Says by the number of a request and its path how to answer: "", "500", "404", "cut", "slow" or "whole"."""


class Server:
    """Files of a folder at an address; `requests` lists (path, first byte, last byte) of what was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requests, self.url = folder, list[tuple[str, int, int]](), ""
        self.fault: Fault = lambda number, path: ""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Serve a folder while the context is open."""
    server = Server(folder)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].lstrip("/")
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            assert found is not None
            first, last = int(found[1]), int(found[2])
            server.requests.append((path, first, last))
            fault = server.fault(len(server.requests), path)
            file = server.folder / path
            if fault.isdigit() or not file.is_file():
                self.send_error(int(fault or 404))
                return
            content, state = file.read_bytes(), file.stat()
            part = content if fault == "whole" else content[first : last + 1]
            self.send_response(200 if fault == "whole" else 206)
            self.send_header("ETag", f'"{state.st_mtime_ns}-{state.st_size}"')
            self.send_header("Content-Length", str(len(part)))
            if fault != "whole":
                self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
            self.end_headers()
            if fault == "slow":
                time.sleep(0.1)
            self.wfile.write(part[: max(1, len(part) // 3)] if fault == "cut" else part)

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    thread = Thread(target=web.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{web.server_address[1]}"
    try:
        yield server
    finally:
        web.shutdown()
        web.server_close()
        thread.join()
