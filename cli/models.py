"""Define `tokdyn models`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import typer

from .frame import command
from .output import Json, as_json, table
from .settings import read


def _settings() -> type:
    from tokdyn.catalog import CatalogSettings

    return CatalogSettings


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "models",
        settings=_settings,
        examples=["tokdyn models", "tokdyn models sample_size=64 target=16 --json"],
    )
    def models(ctx: typer.Context, json: Json = False) -> None:
        """List models: named sizes, pretrained ones, and families.

        Named sizes are listed with their cost, and families of models with the methods that can be attached to them.
        """
        from tokdyn.catalog import CatalogSettings, bases, catalog, classes, families

        entries, pretrained, known = catalog(read(ctx.args, CatalogSettings)), bases(), families()
        if json:
            listed: list[Any] = [*entries, *pretrained, *known, *classes()]
            as_json([asdict(entry) for entry in listed])
            return
        table(
            ["kind", "name", "parameters", "tokens", "computed", "GFLOPs"],
            [(e.kind, e.name, f"{e.parameters:,}", e.tokens, f"{e.computed:.0f}", f"{e.gflops:.2f}") for e in entries],
        )
        typer.echo("GFLOPs: one forward pass on one image; a multiply-add counts as 2 FLOPs.\n")
        table(
            ["pretrained", "format", "objective", "parameters", "in cache", "source"],
            [
                (e.name, e.format, e.objective, f"{e.parameters:,}", "yes" if e.cached else "no", _short(e.source))
                for e in pretrained
            ],
        )
        typer.echo("docs/bases.md describes them and the cache.\n")
        table(["family", *known[0].methods], [(family.name, *family.methods.values()) for family in known])
        typer.echo("\nClasses of each family, and what is refused and why:")
        for family in known:
            typer.echo(f"  {family.name}: {', '.join(family.classes)}")
            for reason in dict.fromkeys(family.refused.values()):
                settings = [setting for setting, why in family.refused.items() if why == reason]
                typer.echo(f"    not {', '.join(settings)}: {reason}")
        typer.echo("\nTransformers of diffusers without a family, the methods that work on them, and why no others:")
        for each in classes():
            works = [method for method, answer in each.methods.items() if answer == "yes"]
            typer.echo(f"  {each.name}: {', '.join(works) or 'none'}; {each.reason}")
        typer.echo("Other models: DepthSkip and FeatureCache, if their structure can be read; see docs/adapters.md.")


def _short(source: str) -> str:
    """Strip the query from a URL."""
    return source.partition("?")[0]
