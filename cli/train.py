"""`tokdyn train`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import split
from .frame import command
from .output import Json, as_json, pairs
from .settings import flags

if TYPE_CHECKING:
    from tokdyn.recipe import Recipe


def _settings() -> type:
    from tokdyn.recipe import Recipe

    return Recipe


def register(app: typer.Typer) -> None:
    """Adds the command."""

    @command(
        app,
        "train",
        words=["RECIPE"],
        settings=_settings,
        examples=[
            "tokdyn train demo",
            "tokdyn train demo out=runs/mine optimizer.lr=3e-4 model.depth=6",
            "tokdyn train demo --dry-run --json",
            "tokdyn train runs/mine --resume",
        ],
    )
    def train(
        ctx: typer.Context,
        resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its last checkpoint.")] = False,
        dry_run: Annotated[
            bool, typer.Option("--dry-run", help="Print parameters, FLOPs and estimated time; train nothing.")
        ] = False,
        json: Json = False,
    ) -> None:
        """Train a recipe: a shipped one, a YAML file, or the folder of a run."""
        from tokdyn import recipe

        given = split(ctx.args, frozenset(flags(recipe.Recipe)))
        (name,) = given.take(["RECIPE"])
        carry_out(recipe.load(name, given.overrides()), resume, dry_run, json)


def carry_out(recipe: Recipe, resume: bool, dry_run: bool, json: bool) -> None:
    """Plans or trains a recipe, prints what came of it, and ends the command with the exit code of the run."""
    if dry_run:
        from tokdyn.train import dry_run as plan

        planned = plan(recipe)
        if json:
            as_json({**asdict(planned), "seconds": planned.seconds})
        else:
            pairs(planned.lines())
        return
    from tokdyn.report.preview import draw_preview
    from tokdyn.train import train as run

    result = run(recipe, resume=resume, preview=draw_preview)
    done = {"folder": result.folder, "step": result.step, "steps": result.steps, "metrics": result.row}
    if result.finished and recipe.upcycle is not None and recipe.upcycle.after:
        from tokdyn.calibration.after_training import finish

        done["methods"] = finish(result.folder, recipe.upcycle.after)
        typer.echo(f"Methods for `tokdyn sample {result.folder} methods={done['methods']}`.", err=True)
    if json:
        as_json(done)
    raise typer.Exit(result.exit_code)
