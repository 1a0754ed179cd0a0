"""Catch Ctrl-C and SIGTERM, so that a run can finish its step and save; a second one interrupts it at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which the first SIGINT or SIGTERM sets `requested`, and the next one acts as usual.

    In a thread other than the main one it has no effect, because Python handles signals in the main thread only.

    Attributes:
        requested: Whether a signal came.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Handle the first signal."""
        self.requested = True
        self._restore()  # so that the next signal interrupts

    def _restore(self) -> None:
        """Restore the handlers of signals from before the context."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
