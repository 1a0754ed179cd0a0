"""Show the progress of a training run: a live bar on a terminal, otherwise one line of text per log line."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from tokdyn.progress import duration

_SHOWN = {"loss": "loss {:.4f}", "kept": "kept {:.1%}", "images_per_second": "{:.1f} images/s"}


class ProgressLine:
    """The progress of a run, as a context that shows it on stderr.

    Args:
        total: Steps of the whole run.
        start: Steps already taken.
        shown: Whether to show anything; True for one of several processes.
        console: Where to show the progress; stderr if None.
    """

    def __init__(self, total: int, start: int, shown: bool, console: Console | None = None) -> None:
        self._total = total
        self._start = start
        self._shown = shown
        self._console = console or Console(file=sys.stderr)
        self._began = time.monotonic()
        self._live: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._shown and self._console.is_terminal:
            columns = (TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(), TaskProgressColumn())
            self._live = Progress(*columns, TextColumn("{task.fields[text]}"), console=self._console)
            self._task = self._live.add_task("train", total=self._total, completed=self._start, text="")
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """Print a line of text that stays on the screen."""
        if self._shown:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, done: int) -> None:
        """Move the bar to the number of steps taken; does nothing if stderr is not a terminal."""
        if self._live is not None:
            self._live.update(self._task, completed=done)

    def log(self, done: int, row: dict[str, Any]) -> None:
        """Show some metrics of a new log line and the time that is left.

        Args:
            done: Steps taken.
            row: The metrics by name.
        """
        parts = [text.format(row[name]) for name, text in _SHOWN.items() if name in row]
        taken = done - self._start
        if taken > 0:
            left = (time.monotonic() - self._began) / taken * (self._total - done)
            parts.append(f"ETA {duration(left)}")
        text = "  ".join(parts)
        if self._live is not None:
            self._live.update(self._task, completed=done, text=text)
        else:
            self.note(f"step {done}/{self._total}  {text}")
