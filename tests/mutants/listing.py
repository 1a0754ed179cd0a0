"""Write the list of the mistakes that no test notices, and keep the reasons that people wrote into it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from making import Mutant

HEAD = """# Mistakes that no test notices

`make mutants` makes mistakes in the code one at a time and runs the tests that reach them. This page is what it
printed; the reasons are written by hand and kept when it is printed again (`make mutants LIST=1`). How it works, and
what is left out: [CONTRIBUTING](../../CONTRIBUTING.md#deliberate-mistakes).

Where there is an interval, the mistakes tried are a random sample of the room; "all" are all of them. A room that is
missing was not run.
"""
UNKNOWN = "not looked at yet"


@dataclass(frozen=True)
class Tally:
    """What became of the mistakes of one room.

    Attributes:
        room: its name.
        made: mistakes that can be made in it.
        killed: mistakes that a test noticed.
        timeout: mistakes with which the tests did not come to an end.
        survived: mistakes that no test noticed.
    """

    room: str
    made: int
    killed: int
    timeout: int
    survived: int

    @property
    def tried(self) -> int:
        """Mistakes that were made."""
        return self.killed + self.timeout + self.survived

    @property
    def share(self) -> float:
        """The share that was noticed, 1 where none was tried."""
        return 1.0 - self.survived / self.tried if self.tried else 1.0

    def interval(self) -> tuple[float, float]:
        """Compute the 95% interval (Wilson) of the share over the whole room, a point where all were tried."""
        if self.tried in (0, self.made):
            return self.share, self.share
        z, n, p = 1.96, self.tried, self.share
        middle, width = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return (middle - width) / (1 + z * z / n), (middle + width) / (1 + z * z / n)

    def row(self) -> tuple[str, ...]:
        """The cells of the table."""
        low, high = self.interval()
        between = "all" if low == high else f"{low:.1%} to {high:.1%}"
        numbers = (self.made, self.tried, self.killed, self.timeout, self.survived)
        return (self.room, *map(str, numbers), f"{self.share:.1%}", between)


COLUMNS = ("room", "made", "tried", "killed", "timed out", "survived", "noticed", "95% interval")


def table(rows: Iterable[Sequence[str]], columns: Sequence[str]) -> str:
    """Format a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _code(text: str) -> str:
    """Format source as a code span in a cell."""
    return f"`` {text.replace('|', chr(92) + '|')} ``" if text else "nothing"


def _row(mutant: Mutant) -> str:
    return f"| `{mutant.scope or 'module'}` | {_code(mutant.before)} | {_code(mutant.after)} |"


FILE = """### `{}`

| where | code | mistake | why it stays |
| --- | --- | --- | --- |
{}
"""


def write(
    path: Path, versions: str, tallies: Sequence[Tally], survivors: Sequence[Mutant], rooms: Sequence[str]
) -> None:
    """Write the list; the rows of other rooms and the reasons of rows that remain are kept.

    Args:
        path: of the list.
        versions: date and versions, for the table's caption.
        tallies: of the rooms that were run.
        survivors: of those rooms, in the order in which they are to appear.
        rooms: files of the rooms that were run; rows of other files stay.
    """
    old = path.read_text().splitlines() if path.exists() else []
    counted: dict[str, list[str]] = {}
    files: dict[str, dict[str, str]] = {}
    file = ""
    for line in old:
        if line.startswith("### "):
            file = line[4:].strip("`")
        elif line.startswith("| ") and not line.startswith(("| room", "| where", "| ---")):
            head, reason = line.removesuffix(" |").rsplit(" | ", 1)
            if file:
                files.setdefault(file, {})[head + " |"] = reason
            else:
                cells = head.strip("| ").split(" | ")
                counted[cells[0]] = [*cells, reason]
    for tally in tallies:
        counted[tally.room] = [*tally.row(), versions]
    rows = {name: reasons for name, reasons in files.items() if name not in rooms}
    for mutant in survivors:
        reason = files.get(mutant.path, {}).get(_row(mutant), UNKNOWN)
        rows.setdefault(mutant.path, {})[_row(mutant)] = reason
    parts = [HEAD, table(counted.values(), (*COLUMNS, "run on, with")) + "\n"]
    for name in sorted(rows):
        lines = [f"{row} {reason} |" for row, reason in rows[name].items()]
        parts.append(FILE.format(name, "\n".join(lines)))
    path.write_text("\n".join(parts))
