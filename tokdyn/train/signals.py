"""Catch Ctrl-C, SIGTERM and SIGHUP, so that a run can finish its step and save; a second one interrupts it at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_TOGETHER = 0.5  # seconds within which signals of a kind are one: launchers repeat what the terminal has sent


class StopRequest:
    """A context in which the first of these signals is remembered; a second one of its kind acts as usual.

    A signal that is ignored stays ignored, as SIGHUP under nohup. In a thread other than the main one the context has
    no effect, because Python handles signals in the main thread only.

    Attributes:
        signal: The first signal that came; None so far.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[int, Any] = {}
        self._came: dict[int, float] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal, and let a second one act."""
        now = time.monotonic()
        if now - self._came.setdefault(number, now) > _TOGETHER:
            self._restore()
            signal.raise_signal(number)
        elif self.signal is None:
            self.signal = signal.Signals(number)

    def _restore(self) -> None:
        """Restore the handlers of signals from before the context."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
