"""Write and read the logs of a run, whose rows are lines of JSON: metrics.jsonl and events.jsonl.

A checkpoint holds a copy of each, so that a resumed run has neither a gap nor a row twice, whatever happened to them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tokdyn.train.checkpoints import refused, write_text

Row = dict[str, Any]
"""One line of a log: values by name, with the step under "step"."""
METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
LOGS = (METRICS, EVENTS)
"""Names of the logs in the folder of a run."""


def append(path: Path, row: Row) -> None:
    """Append a row to a log as one line of JSON.

    Raises:
        CheckpointError: The system refused to write.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise refused(path, error) from error


def read(path: Path) -> list[Row]:
    """Return the rows of a log, without lines that are damaged; [] if there is no file."""
    return _read(path)[0]


def restore(path: Path, kept: Path | None, step: int) -> str | None:
    """Let a log end at the step that a run resumes at, which writes the later rows again.

    Args:
        path: The log, which may be damaged or missing.
        kept: The copy of it in the checkpoint; None, or a path without a file, if there is none.
        step: Rows of later steps are removed.

    Returns:
        A sentence if the log was damaged; None if it was not.

    Raises:
        CheckpointError: The system refused to write.
    """
    found, damaged = _read(path)
    rows = list({(row["step"], row.get("event")): row for row in found if row["step"] <= step}.values())
    if kept is not None and kept.is_file():
        rows = _read(kept)[0]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.is_file() or text:
        write_text(path, text)
    earlier = "".join(json.dumps(row) + "\n" for row in found if row["step"] <= step)
    if not damaged and earlier == text:
        return None
    lines = f"{damaged} damaged line{'' if damaged == 1 else 's'}" if damaged else "rows missing or changed"
    return f"{path} had {lines}, and holds {len(rows)} rows up to step {step} again."


def copy(path: Path, folder: Path) -> None:
    """Copy the undamaged rows of a log into the folder of a checkpoint, if there is a log."""
    rows = read(path)
    if rows:
        (folder / path.name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _read(path: Path) -> tuple[list[Row], int]:
    """Return the rows of a log, and the number of lines that are none."""
    rows: list[Row] = []
    damaged = 0
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        step = row.get("step") if isinstance(row, dict) else None
        if isinstance(step, int | float) and not isinstance(step, bool) and math.isfinite(step):
            rows.append(row)
        else:
            damaged += 1
    return rows, damaged
