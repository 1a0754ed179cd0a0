"""Define `tokdyn presets`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from . import pages
from .arguments import split
from .frame import command
from .output import Json, as_json, paragraph

if TYPE_CHECKING:
    from tokdyn.presets import PresetRow

_WIDTH = 200  # columns of a table that is not on a terminal
_NARROW = 100  # columns of a terminal on which the table would break words
COLUMNS = ("model", "setting", "method", "settings", "indicator", "steps", "speed-up", "quality", "source", "measured")


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "presets",
        words=["[MODEL]"],
        examples=[
            "tokdyn presets",
            "tokdyn presets FLUX.1-dev",
            "tokdyn presets wan --json",
            "tokdyn presets calibrated/flux/preset.yaml",
        ],
    )
    def presets(
        ctx: typer.Context,
        json: Json = False,
        markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of docs/presets.md.")] = False,
    ) -> str:
        """List published settings of methods for named models.

        MODEL is part of the name of a model, a family or a class, or a preset file. Attach one with
        tokdyn.wrap(pipe, "fast") or tokdyn.wrap(pipe, "FLUX.1-dev/fast").
        """
        (wanted,) = split(ctx.args).no_settings().take(optional=["MODEL"])
        rows = _rows(wanted)
        if json:
            as_json([asdict(row) for row in rows])
        elif markdown:
            _markdown(rows)
        else:
            _table(rows)
        return "tokdyn calibrate FOLDER_OR_HUB_ID method=cache cache_steps=0.6 prompts=prompts.txt"


def _rows(wanted: str) -> list[PresetRow]:
    """Return the rows about a model or of a preset file; all of them for ""."""
    from tokdyn.catalog import stored
    from tokdyn.files import require_path, user_path
    from tokdyn.presets.rows import about, is_file

    if not is_file(wanted):
        rows = stored().presets
        return about(rows, wanted) if wanted else list(rows)
    require_path(user_path(wanted))
    from tokdyn.presets import listed

    return listed(wanted)


def _cells(row: PresetRow) -> tuple[str, ...]:
    speed = "-" if row.speedup is None else f"{row.speedup:g}x"
    speed = f"{speed}, {row.hardware}" if row.hardware else speed
    facts = (row.method, row.settings, row.indicator, "-" if row.steps is None else str(row.steps), speed)
    measured = "no" if row.measured is None else ", ".join(f"{key} {value}" for key, value in row.measured.items())
    return (row.model, row.setting, *facts, row.quality or "-", row.source or "-", measured)


def _table(rows: list[PresetRow]) -> None:
    """Print a table that fits the terminal, and the notes under it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, box=SIMPLE_HEAD, pad_edge=False)
    with_settings = [row for row in rows if row.setting != "-"]
    if with_settings and sys.stdout.isatty() and pages.width() < _NARROW:
        for row in with_settings:
            values = [f"{name} {cell}" for name, cell in zip(COLUMNS[2:], _cells(row)[2:], strict=True) if cell != "-"]
            paragraph(f"{row.model}/{row.setting}: {'; '.join(values)}")
        with_settings = []
    for row in with_settings:
        table.add_row(*_cells(row))
    if with_settings:
        Console(width=None if sys.stdout.isatty() else _WIDTH, markup=False, highlight=False).print(table)
    for model, note in _notes(rows):
        typer.echo(f"{model}: {note}.")
    typer.echo("Speed-up and quality are what the sources report; tokdyn has measured none of it with real weights.")


def _markdown(rows: list[PresetRow]) -> None:
    """Print the table of docs/presets.md."""
    typer.echo(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in rows:
        if row.setting != "-":
            typer.echo(f"| {' | '.join(_cells(row))} |")
    typer.echo()
    for model, note in _notes(rows):
        typer.echo(f"- {model}: {note}.")


def _notes(rows: list[PresetRow]) -> list[tuple[str, str]]:
    """Return the notes of models, each with the settings that it is about unless those are all of them."""
    notes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for note in (row.note, row.instead):
            if note:
                notes.setdefault((row.model, note), []).append(row.setting)
    count = {row.model: sum(other.model == row.model for other in rows) for row in rows}
    return [
        (model if len(settings) == count[model] else f"{model} ({', '.join(settings)})", note)
        for (model, note), settings in notes.items()
    ]
