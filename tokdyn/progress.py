"""Tell on stderr what was chosen, and show the progress of long work there.

Progress is a bar on a terminal, and occasional plain lines elsewhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_INTERVAL = 30.0  # seconds between plain lines
_told: set[str] = set()


def tell(text: str) -> None:
    """Print a line on stderr, once in a process."""
    if text not in _told:
        _told.add(text)
        print(f"tokdyn: {text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Write seconds as 45s, 12m05s, 3h07m or 2d04h."""
    whole = round(seconds)
    for unit, size, inner, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{inner}"
    return f"{whole}s"


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show the progress of a piece of work on stderr.

    Args:
        title: name of the work.
        total: number of items to be done.

    Yields:
        A function to call as items are finished, with the number of items since its last call.
    """
    if sys.stderr.isatty():
        with _bar(title, total) as advance:
            yield advance
    else:
        yield _Lines(title, total).advance


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar that disappears when the work is done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda done: bar.advance(task, done)


class _Lines:
    """Prints the progress as plain lines, at most one per half minute."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._began = self._printed = time.monotonic()

    def advance(self, done: int) -> None:
        """Add finished items, and print a line if the last one is half a minute old."""
        self._done += done
        now = time.monotonic()
        if now - self._printed < _INTERVAL or not self._done:
            return
        self._printed = now
        left = (now - self._began) / self._done * (self._total - self._done)
        print(f"{self._title}  {self._done}/{self._total}  ETA {duration(left)}", file=sys.stderr, flush=True)


def in_ms(seconds: float) -> str:
    """Write a time in milliseconds."""
    return f"{1e3 * seconds:,.1f}"
