"""Define `tokdyn methods`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from .arguments import split
from .frame import command
from .output import Json, as_json, paragraph, shell
from .pages import definitions


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "methods",
        words=["[METHOD]"],
        examples=["tokdyn methods", "tokdyn methods TokenMerge", "tokdyn methods --json"],
    )
    def methods(ctx: typer.Context, json: Json = False) -> str:
        """List the methods, their settings and their models."""
        from tokdyn.errors import InputError
        from tokdyn.method_names import ALIASES, full_name
        from tokdyn.recipe.explain import nearest

        (wanted,) = split(ctx.args).no_settings().take(optional=["METHOD"])
        if wanted and full_name(wanted) not in ALIASES:
            raise InputError(f"There is no method {wanted!r}{nearest(wanted, ALIASES)}.")
        from tokdyn.catalog import shipped

        known = shipped()
        following = "tokdyn presets"
        if wanted:
            stack = f"{{name: tried, methods: [{{method: {full_name(wanted)}}}]}}"
            following = shell("tokdyn", "bench", "speed", "DiT-S/2", "--stack", "{name: plain}", "--stack", stack)
        entries = [entry for entry in known.methods if not wanted or entry.name == full_name(wanted)]
        if json:
            as_json([asdict(entry) for entry in entries])
            return following
        for entry in entries:
            lines = [
                ("or", ", ".join(ALIASES.get(entry.name, ()))),
                ("acts", f"in {' and '.join(entry.acts)}, on the {entry.stage}"),
            ]
            for support, title in (("yes", "works on"), ("partly", "partly on"), ("no", "not on")):
                names = [name for name, found in entry.families.items() if found == support]
                lines += [(title, ", ".join(names))] if names else []
            paragraph(f"{entry.name}: {entry.what}")
            typer.echo("\n".join([*definitions([*lines, *known.explained[entry.name].items()]), ""]))
        paragraph("tokdyn models lists what each family refuses, and why. For other models, see docs/adapters.md.")
        return following
