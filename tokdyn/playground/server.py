"""Serve the page on this machine alone unless another host is asked for. Nothing is sent anywhere."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tokdyn.errors import InputError


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens at an address.

    Raises:
        InputError: there is no such address on this machine, or something else listens there.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen()
        except OSError:
            listener.close()
            raise
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise InputError(f"nothing can listen at {host}, port {port}: {why}; give another host= or port=.") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Return the address of a page that is served on a socket, as a browser takes it."""
    host, port = listener.getsockname()[:2]
    name = "localhost" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    return f"http://{name}:{port}"


def serve(page: Any, style: str, listener: socket.socket, ready: Callable[[str], None]) -> None:
    """Serve a page of gradio until the process is interrupted.

    gradio's own `launch` is not used, which could open a link for anybody on the internet.

    Args:
        page: the page.
        style: CSS of the page.
        listener: where to listen.
        ready: called with the address of the page, which answers from then on.
    """
    import gradio
    import uvicorn
    from fastapi import FastAPI

    app = FastAPI(openapi_url=None)
    theme = gradio.themes.Default(primary_hue="teal", font=["system-ui", "sans-serif"])  # no request to other hosts
    gradio.mount_gradio_app(
        app, page, path="/", css=style, theme=theme, footer_links=[], run_history=False, enable_monitoring=False,
        ssr_mode=False, pwa=False, mcp_server=False,
    )  # fmt: skip
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    with listener, suppress(KeyboardInterrupt):
        ready(address_of(listener))
        uvicorn.Server(config).run(sockets=[listener])
