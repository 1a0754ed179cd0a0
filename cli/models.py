"""Define `tokdyn models`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import typer

from .frame import command
from .output import Json, as_json, paragraph, table
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
    def models(ctx: typer.Context, json: Json = False) -> str:
        """List models: named sizes, pretrained ones, and families.

        Named sizes are listed with their cost, and families of models with the methods that can be attached to them.
        """
        from tokdyn.catalog import CatalogSettings, catalog, shipped
        from tokdyn.method_names import short_name

        settings = read(ctx.args, CatalogSettings)
        stored = shipped()
        pretrained, known = stored.bases, stored.families
        entries = stored.sizes if settings == CatalogSettings() else catalog(settings)
        names = [each.name for each in pretrained]
        following = (
            "tokdyn sample shapes/dc-dit steps=25 guidance=3 tail_drop=0,0.6"
            if "shapes/dc-dit" in names
            else "tokdyn sample shapes steps=25"
        )
        if json:
            listed: list[Any] = [*entries, *pretrained, *known, *stored.classes]
            as_json([asdict(entry) for entry in listed])
            return following
        table(
            ["kind", "name", "parameters", "tokens", "computed", "GFLOPs"],
            [(e.kind, e.name, f"{e.parameters:,}", e.tokens, f"{e.computed:.0f}", f"{e.gflops:.2f}") for e in entries],
        )
        paragraph(
            "These are sizes, for tokdyn bench and for model.name in recipes; they have no trained weights. GFLOPs: "
            "one forward pass on one image; a multiply-add counts as 2 FLOPs."
        )
        typer.echo()
        table(
            ["pretrained", "format", "objective", "parameters", "in cache"],
            [(e.name, e.format, e.objective, f"{e.parameters:,}", "yes" if e.cached else "no") for e in pretrained],
        )
        paragraph("docs/bases.md says where they come from, and describes the cache.")
        typer.echo()
        names = [str(short_name(method)) for method in known[0].methods]
        table(["family", *names], [(family.name, *family.methods.values()) for family in known])
        paragraph(f"The methods are {', '.join(known[0].methods)}.")
        typer.echo("\nClasses of each family, and what is refused and why:")
        for family in known:
            paragraph(f"{family.name}: {', '.join(family.classes)}", "  ")
            for reason in dict.fromkeys(family.refused.values()):
                given = [setting for setting, why in family.refused.items() if why == reason]
                paragraph(f"not {', '.join(given)}: {reason}", "    ")
        typer.echo()
        paragraph("Transformers of diffusers without a family, the methods that work on them, and why no others:")
        for each in stored.classes:
            works = [method for method, answer in each.methods.items() if answer == "yes"]
            paragraph(f"{each.name}: {', '.join(works) or 'none'}; {each.reason}", "  ")
        paragraph("Other models: DepthSkip and FeatureCache, if their structure can be read; see docs/adapters.md.")
        return following
