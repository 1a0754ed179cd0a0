"""Define `tokdyn methods`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from .arguments import split
from .frame import command
from .output import Json, as_json, pairs
from .settings import rows


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "methods",
        words=["[METHOD]"],
        examples=["tokdyn methods", "tokdyn methods TokenMerge", "tokdyn methods --json"],
    )
    def methods(ctx: typer.Context, json: Json = False) -> None:
        """List the methods, their settings and their models."""
        from tokdyn.catalog import methods as catalog
        from tokdyn.errors import InputError
        from tokdyn.methods import METHODS, find_method

        (wanted,) = split(ctx.args).no_settings().take(optional=["METHOD"])
        method = find_method(wanted)
        entries = [entry for entry in catalog() if not wanted or (method and entry.name == method.__name__)]
        if not entries:
            raise InputError(f"There is no method {wanted!r}; choose from {', '.join(METHODS)}.")
        if json:
            as_json([asdict(entry) for entry in entries])
            return
        for entry in entries:
            lines = [("acts", f"in {' and '.join(entry.acts)}, on the {entry.stage}")]
            for support, title in (("yes", "works on"), ("partly", "partly on"), ("no", "not on")):
                names = [name for name, found in entry.families.items() if found == support]
                lines += [(title, ", ".join(names))] if names else []
            typer.echo(f"{entry.name}: {entry.what}")
            pairs((f"  {key}", text) for key, text in [*lines, *rows(METHODS[entry.name])])
            typer.echo()
        typer.echo("tokdyn models lists what each family refuses, and why. For other models, see docs/adapters.md.")
