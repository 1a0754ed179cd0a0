"""Print results as aligned columns for people and as JSON for programs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

from . import pages

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]


def as_json(value: Any) -> None:
    """Print a value as JSON; values that JSON does not have, such as paths, become text."""
    typer.echo(json.dumps(value, indent=2, default=str))


def table(header: Sequence[str], body: Iterable[Sequence[object]]) -> None:
    """Print rows under a header, with numbers aligned to the right."""
    rows = [[str(cell) for cell in row] for row in body]
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    right = [bool(rows) and all(_numeric(row[i]) for row in rows) for i in range(len(header))]
    for row in [list(header), *rows]:
        cells = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
        typer.echo("  ".join(cells).rstrip())


def columns(table_columns: dict[str, list[str]]) -> None:
    """Print a table from its columns: the texts of each column by title."""
    table(list(table_columns), zip(*table_columns.values(), strict=True))


def files(paths: Iterable[object]) -> None:
    """Print the paths of files, one per line."""
    for path in paths:
        typer.echo(f"  {path}")


def pairs(body: Iterable[tuple[str, object]]) -> None:
    """Print one name and its value per line."""
    rows = list(body)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        typer.echo(f"{name:<{width}}  {value}")


def _numeric(cell: str) -> bool:
    """Return whether a cell holds a number, a percentage, or "-" for none."""
    return cell.replace(",", "").replace(".", "", 1).removesuffix("%").lstrip("-").isdigit() or cell == "-"


def shell(*words: object) -> str:
    """Return a shell command of these words, quoted where necessary; words that are None are left out."""
    return shlex.join(str(word) for word in words if word is not None)


def paragraph(text: str, indent: str = "") -> None:
    """Print a paragraph, broken between words where the terminal ends; other lines than the first are indented more."""
    for line in pages.wrapped(text, indent, f"{indent}  "):
        typer.echo(line)
