"""Show the progress of a run: a live line on a terminal, one plain line per log step elsewhere."""

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
    """The progress of a run on stderr.

    Args:
        total: Steps of the whole run.
        start: Steps already taken.
        shown: Whether to show anything; False on all but one of several processes.
        console: Shows it in place of stderr.
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
        """Print a line that stays on the screen."""
        if self._shown:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def step(self, done: int) -> None:
        """Move the bar."""
        if self._live is not None:
            self._live.update(self._task, completed=done)

    def log(self, done: int, row: dict[str, Any]) -> None:
        """Show the means since the last line of metrics.

        Args:
            done: Steps taken.
            row: The new line of metrics.
        """
        words = [text.format(row[name]) for name, text in _SHOWN.items() if name in row]
        taken = done - self._start
        if taken > 0:
            left = (time.monotonic() - self._began) / taken * (self._total - done)
            words.append(f"ETA {duration(left)}")
        text = "  ".join(words)
        if self._live is not None:
            self._live.update(self._task, completed=done, text=text)
        else:
            self.note(f"step {done}/{self._total}  {text}")
