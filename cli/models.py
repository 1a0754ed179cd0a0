"""`tokdyn models`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from .frame import command
from .output import Json, as_json, table
from .settings import read


def _settings() -> type:
    from tokdyn.catalog import CatalogSettings

    return CatalogSettings


def register(app: typer.Typer) -> None:
    """Adds the command."""

    @command(
        app,
        "models",
        settings=_settings,
        examples=["tokdyn models", "tokdyn models sample_size=64 target=16 --json"],
    )
    def models(ctx: typer.Context, json: Json = False) -> None:
        """List the named models, their parameters and FLOPs."""
        from tokdyn.catalog import CatalogSettings, catalog

        entries = catalog(read(ctx.args, CatalogSettings))
        if json:
            as_json([asdict(entry) for entry in entries])
            return
        table(
            ["kind", "name", "parameters", "tokens", "computed", "GFLOPs"],
            [(e.kind, e.name, f"{e.parameters:,}", e.tokens, f"{e.computed:.0f}", f"{e.gflops:.2f}") for e in entries],
        )
        typer.echo("GFLOPs: one forward pass on one image; a multiply-add counts as 2 FLOPs.")
