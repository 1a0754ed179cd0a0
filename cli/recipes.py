"""Define `tokdyn recipes ls`, `show`, `copy` and `check`."""

from __future__ import annotations

import typer

from .arguments import split
from .frame import command, group
from .output import Json, as_json, shell
from .pages import definitions
from .settings import flags

app = group("recipes", "List, show and copy the shipped recipes, and check your own.")


def _recipe() -> type:
    from tokdyn.recipe import Recipe

    return Recipe


@command(app, "ls", examples=["tokdyn recipes ls", "tokdyn recipes ls --json"])
def ls(ctx: typer.Context, json: Json = False) -> str:
    """List the shipped recipes."""
    from tokdyn import recipe

    split(ctx.args).no_settings().take()
    summaries = recipe.summaries()
    if json:
        as_json(summaries)
    else:
        typer.echo("\n".join(definitions(summaries.items(), "")))
    return "tokdyn train demo --dry-run"


@command(app, "show", words=["RECIPE"], examples=["tokdyn recipes show demo"])
def show(ctx: typer.Context) -> str:
    """Print the file of a shipped recipe, comments included."""
    from tokdyn import recipe

    (name,) = split(ctx.args).no_settings().take(["RECIPE"])
    typer.echo(recipe.show(name).rstrip())
    return shell("tokdyn", "recipes", "copy", name, f"my-{name.rpartition('/')[2]}.yaml")


@command(app, "copy", words=["RECIPE", "[TO]"], examples=["tokdyn recipes copy demo my-demo.yaml"])
def copy(ctx: typer.Context) -> str:
    """Copy a shipped recipe to a file or a folder for editing."""
    from tokdyn import recipe

    name, to = split(ctx.args).no_settings().take(["RECIPE"], ["TO"])
    written = recipe.copy(name, to or ".")
    typer.echo(f"Wrote {written}")
    return shell("tokdyn", "train", written, "--dry-run")


@command(
    app,
    "check",
    words=["RECIPE"],
    settings=_recipe,
    main=["model.kind", "model.name", "data.kind", "data.path", "data.size", "training.steps", "optimizer.lr"],
    examples=["tokdyn recipes check my-demo.yaml", "tokdyn recipes check demo optimizer.lr=3e-4"],
)
def check(ctx: typer.Context) -> str:
    """Validate a recipe and print it with all defaults.

    The check also builds the model, without allocating memory for its weights.
    """
    from tokdyn import recipe

    given = split(ctx.args, frozenset(flags(recipe.Recipe)))
    (name,) = given.take(["RECIPE"])
    typer.echo(recipe.dump(recipe.check(name, given.overrides())).rstrip())
    return shell("tokdyn", "train", name, *given.overrides(), "--dry-run")
