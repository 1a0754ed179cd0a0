"""How far long work is: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_EVERY = 30.0  # seconds between plain lines


def duration(seconds: float) -> str:
    """Write seconds as 45s, 12m05s, 3h07m or 2d04h."""
    whole = round(seconds)
    for unit, size, inner, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{inner}"
    return f"{whole}s"


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how far a piece of work is, on stderr.

    Args:
        title: what is being done.
        total: number of items.

    Yields:
        A function to call with the number of items done since its last call.
    """
    if sys.stderr.isatty():
        with _bar(title, total) as advance:
            yield advance
    else:
        yield _Lines(title, total).advance


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar that goes away when the work is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


class _Lines:
    """One line for every half minute that the work takes."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._began = self._said = time.monotonic()

    def advance(self, done: int) -> None:
        """Count what was done, and say so if it is time."""
        self._done += done
        now = time.monotonic()
        if now - self._said < _EVERY or not self._done:
            return
        self._said = now
        left = (now - self._began) / self._done * (self._total - self._done)
        print(f"{self._title}  {self._done}/{self._total}  ETA {duration(left)}", file=sys.stderr, flush=True)
