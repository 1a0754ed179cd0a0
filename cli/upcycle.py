"""`tokdyn upcycle`."""

from __future__ import annotations

from typing import Annotated

import typer

from .arguments import split
from .frame import command
from .output import Json
from .settings import flags


def _settings() -> type:
    from tokdyn.recipe import Recipe

    return Recipe


def register(app: typer.Typer) -> None:
    """Adds the command."""

    @command(
        app,
        "upcycle",
        settings=_settings,
        examples=[
            "tokdyn upcycle --recipe shapes/upcycle out=runs/upcycled",
            "tokdyn upcycle --base runs/dit/model data.path=train.zip training.steps=2000 training.batch_size=64",
            "tokdyn upcycle --base DiT-XL/2 data.path=latents model.target=4 --dry-run",
            "tokdyn upcycle out=runs/upcycled --resume",
        ],
    )
    def upcycle(
        ctx: typer.Context,
        base: Annotated[str | None, typer.Option(help="Pretrained model; by default that of the recipe.")] = None,
        recipe: Annotated[str, typer.Option(help="A recipe with a section upcycle.")] = "upcycle/dc",
        resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")] = False,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Print what is copied, parameters, FLOPs and time; train nothing.")
        ] = False,
        json: Json = False,
    ) -> None:
        """Make a DC-DiT from a pretrained DiT and train it: distilled against the DiT first, then on its own."""
        from tokdyn.recipe import Recipe
        from tokdyn.recipe.upcycled import upcycling

        from .train import carry_out

        given = split(ctx.args, frozenset(flags(Recipe)))
        given.take()
        carry_out(upcycling(base, recipe, given.overrides()), resume, dry_run, json)
