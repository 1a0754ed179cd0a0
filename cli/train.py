"""Define `tokdyn train`: train a model, resume a run, or estimate the cost of a run."""

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
    """Add the command."""

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
        resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")] = False,
        dry_run: Annotated[
            bool,
            typer.Option("--dry-run", help="Print parameters, FLOPs, memory and estimated time, and stop."),
        ] = False,
        json: Json = False,
    ) -> None:
        """Train a model with a recipe, or resume a run.

        RECIPE is the name of a shipped recipe, a YAML file, or the folder of a run.
        """
        from tokdyn import recipe

        given = split(ctx.args, frozenset(flags(recipe.Recipe)))
        (name,) = given.take(["RECIPE"])
        carry_out(recipe.load(name, given.overrides()), resume, dry_run, json)


def carry_out(recipe: Recipe, resume: bool, dry_run: bool, json: bool) -> None:
    """Train a model, and exit with the code of the run; or with `dry_run` print an estimate and return.

    If the run finishes, the methods that its recipe attaches after training are attached and saved too.
    """
    if dry_run:
        from tokdyn.train import dry_run as estimate_run

        estimate = estimate_run(recipe)
        if json:
            as_json({**asdict(estimate), "seconds": estimate.seconds})
        else:
            pairs(estimate.lines())
        return
    from tokdyn.train import train as train_recipe
    from tokdyn.train.preview import draw_preview

    result = train_recipe(recipe, resume=resume, preview=draw_preview)
    summary = {"folder": result.folder, "step": result.step, "steps": result.steps, "metrics": result.row}
    if result.finished and recipe.upcycle is not None and recipe.upcycle.after:
        from tokdyn.calibration.after_training import finish

        summary["methods"] = finish(result.folder, recipe.upcycle.after)
        typer.echo(f"Sample with the methods: tokdyn sample {result.folder} methods={summary['methods']}", err=True)
    if json:
        as_json(summary)
    raise typer.Exit(result.exit_code)
