"""Do work in a thread of its own, show what it makes meanwhile, and let it end early if nobody looks any more."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from tokdyn.trace.timing import Stopwatch

Shown = TypeVar("Shown")


class Cancelled(BaseException):
    """Nobody wants the result any more. It is no Exception, so that no library takes it for an error of its own."""


class Clock:
    """Measures the time of work that is interrupted to show what it has made so far.

    Args:
        device: device that the work runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._watches = [Stopwatch(device)]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time while the context is open."""
        self._watches[-1].stop()
        try:
            yield
        finally:
            self._watches.append(Stopwatch(self._watches[-1].device))

    def stop(self) -> float:
        """End the work, and return its seconds."""
        self._watches[-1].stop()
        return sum(watch.seconds or 0.0 for watch in self._watches)


class _End:
    """Ends the stream of what a thread has sent.

    Args:
        error: the error that it ended with; None if there was none.
    """

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def streamed(
    work: Callable[[Callable[[Shown | None], None]], None], alone: threading.Lock
) -> Generator[Shown, None, None]:
    """Do work in a thread of its own, and yield what it sends while it goes on.

    An iterator that is closed before its end returns at once. The work then ends by the error `Cancelled` when it next
    sends something, and holds the lock until it has put everything back.

    Args:
        work: gets a function that sends a value; sending None only lets the work end if nobody looks any more.
        alone: held while the work is done, so that one piece of work waits for the one before.
    """
    sent: queue.SimpleQueue[Shown | _End] = queue.SimpleQueue()
    unwanted = threading.Event()

    def send(value: Shown | None) -> None:
        if unwanted.is_set():
            raise Cancelled
        if value is not None:
            sent.put(value)

    def run() -> None:
        error: BaseException | None = None
        try:
            with alone:
                send(None)
                work(send)
        except BaseException as raised:
            error = raised
        sent.put(_End(error))

    threading.Thread(target=run, name="tokdyn playground", daemon=True).start()
    try:
        while not isinstance(value := sent.get(), _End):
            yield value
        if value.error is not None:
            raise value.error
    finally:
        unwanted.set()
