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
            "tokdyn upcycle --base runs/dit --method dc data.path=train.zip training.steps=2000 training.batch_size=64",
            "tokdyn upcycle --base DiT-XL/2 --method dc --method dydit --method cache data.path=latents --dry-run",
            "tokdyn upcycle out=runs/upcycled --resume",
        ],
    )
    def upcycle(
        ctx: typer.Context,
        base: Annotated[str | None, typer.Option(help="Pretrained model; by default that of the recipe.")] = None,
        method: Annotated[
            list[str] | None,
            typer.Option(help="dc, dydit (trained), cache, skip=SHARE, merge=RATIO (attached afterwards); repeat it."),
        ] = None,
        recipe: Annotated[str | None, typer.Option(help="A recipe with a section upcycle.")] = None,
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
        made = upcycling(base, recipe, given.overrides(), method or ())
        carry_out(made, resume, dry_run, json)
