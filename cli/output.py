"""Two ways to print a result: aligned columns for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]


def as_json(value: Any) -> None:
    """Prints the value as JSON; paths and the like become text."""
    typer.echo(json.dumps(value, indent=2, default=str))


def table(header: Sequence[str], body: Iterable[Sequence[object]]) -> None:
    """Prints rows under a header; columns of numbers are aligned to the right."""
    rows = [[str(cell) for cell in row] for row in body]
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    right = [bool(rows) and all(_numeric(row[i]) for row in rows) for i in range(len(header))]
    for row in [list(header), *rows]:
        cells = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)]
        typer.echo("  ".join(cells).rstrip())


def columns(found: dict[str, list[str]]) -> None:
    """Prints a table that is given by column."""
    table(list(found), zip(*found.values(), strict=True))


def files(paths: Iterable[object]) -> None:
    """Prints where results lie."""
    for path in paths:
        typer.echo(f"  {path}")


def pairs(body: Iterable[tuple[str, object]]) -> None:
    """Prints what and how much, one pair a line."""
    rows = list(body)
    width = max(len(what) for what, _ in rows)
    for what, value in rows:
        typer.echo(f"{what:<{width}}  {value}")


def _numeric(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "", 1).removesuffix("%").lstrip("-").isdigit() or cell == "-"
