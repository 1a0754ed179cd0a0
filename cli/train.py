"""Define `tokdyn train`: train a model, resume a run, or estimate the cost of a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .arguments import split
from .frame import command
from .output import Json, as_json, pairs, paragraph, shell
from .pages import command_line
from .settings import flags, take_cluster

if TYPE_CHECKING:
    from tokdyn.recipe import Recipe
    from tokdyn.recipe.proposal import Proposal
    from tokdyn.scaling.settings import ScalingSettings

MAIN = (
    "name", "out", "seed", "model.kind", "model.name", "data.kind", "data.path", "data.size", "optimizer.lr",
    "training.steps", "training.batch_size", "training.precision",
)  # fmt: skip
"""Settings of a run that --help explains."""


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
        main=MAIN,
        examples=[
            "tokdyn train photos/",
            "tokdyn train demo out=runs/mine optimizer.lr=3e-4 model.depth=6",
            "tokdyn train imagenet/dc-dit-xl-256 --dry-run gpus=64 gpu=h200",
            "tokdyn train photos.zip training.steps=1000 --yes",
            "tokdyn train runs/mine --resume",
        ],
    )
    def train(
        ctx: typer.Context,
        resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")] = False,
        dry_run: Annotated[
            bool,
            typer.Option(
                "--dry-run",
                help="Estimate parameters, FLOPs, memory and time, and stop.",
            ),
        ] = False,
        yes: Annotated[bool, typer.Option("--yes", help="Train on images as proposed.")] = False,
        json: Json = False,
    ) -> str | None:
        """Train a model with a recipe or on a folder of images.

        RECIPE is the name of a shipped recipe, a YAML file, or the folder of a run. For a folder or a zip of images, a
        recipe is proposed, with the command that trains with it.
        """
        from tokdyn import recipe
        from tokdyn.errors import RecipeError
        from tokdyn.recipe.proposal import holds_images, propose

        given, cluster = take_cluster(split(ctx.args, frozenset(flags(recipe.Recipe))), dry_run)
        (name,) = given.take(["RECIPE"])
        settings = given.overrides()
        if holds_images(name):
            if resume:
                raise RecipeError(f"There is no run to resume in {name}; give the folder of a run.")
            proposal = propose(name, settings)
            resolved = recipe.load(proposal.recipe, proposal.settings)
            if not yes and not dry_run:
                _show(proposal, json)
                return shell("tokdyn", "train", name, *settings, "--yes")
            name, settings = proposal.recipe, list(proposal.settings)
        elif yes:
            raise RecipeError(f"--yes is for a folder or a zip of images, and {name} is a recipe; remove --yes.")
        else:
            resolved = recipe.load(name, settings)
        finished = carry_out(resolved, resume, dry_run, json, cluster)
        if dry_run:
            return shell("tokdyn", "train", name, *settings)
        return sampling(resolved) if finished else None


def _show(proposal: Proposal, json: bool) -> None:
    """Print a proposal."""
    if json:
        as_json({**asdict(proposal), "command": proposal.command})
        return
    count = len(proposal.classes)
    classes = "no classes" if count == 1 else f"{count} classes: {', '.join(list(proposal.classes)[:8])}"
    classes += ", ..." if count > 8 else ""
    size = f"{proposal.width}x{proposal.height} pixels (median)"
    paragraph(f"{proposal.path} holds {proposal.images:,} images of {size}, with {classes}.")
    typer.echo("Proposed, with more settings behind it if you like:\n")
    typer.echo("\n".join(command_line(proposal.command)) + "\n")
    for note in proposal.notes:
        paragraph(note)


def sampling(recipe: Recipe) -> str:
    """Return the command that samples from a finished run, with the methods that were attached after it."""
    methods = Path(recipe.folder) / "methods"
    with_methods = f"methods={methods}" if recipe.upcycle is not None and recipe.upcycle.after else None
    return shell("tokdyn", "sample", recipe.folder, "steps=25", with_methods)


def carry_out(recipe: Recipe, resume: bool, dry_run: bool, json: bool, cluster: ScalingSettings | None = None) -> bool:
    """Train a model, and exit with the code of the run unless it is 0; or with `dry_run` print an estimate.

    The estimate is that on the GPUs of `cluster`, if it is given, and otherwise that on this machine.

    If the run finishes, the methods that its recipe attaches after training are attached and saved too.

    Returns:
        Whether there is a finished model.
    """
    if dry_run:
        from tokdyn.train import dry_run as estimate_run

        estimate = estimate_run(recipe, time_steps=cluster is None, cluster=cluster)
        if json:
            plan = estimate.scaling and estimate.scaling.as_dict()
            as_json({**asdict(estimate), "seconds": estimate.seconds, "scaling": plan})
        else:
            pairs(estimate.lines())
        return False
    from tokdyn.train import train as train_recipe
    from tokdyn.train.preview import draw_preview

    result = train_recipe(recipe, resume=resume, preview=draw_preview)
    summary = {"folder": result.folder, "step": result.step, "steps": result.steps, "metrics": result.row}
    if result.finished and recipe.upcycle is not None and recipe.upcycle.after:
        from tokdyn.calibration.after_training import finish

        summary["methods"] = finish(result.folder, recipe.upcycle.after)
    if json:
        as_json(summary)
    if result.exit_code:
        raise typer.Exit(result.exit_code)
    return result.finished
