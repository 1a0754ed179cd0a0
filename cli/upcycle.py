"""Define `tokdyn upcycle`: build a student from a pretrained model and train it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .arguments import split
from .frame import command
from .output import Json, as_json, columns, pairs, shell
from .settings import flags, read, take_cluster
from .train import carry_out, sampling


def _settings() -> type:
    from tokdyn.recipe import Recipe

    return Recipe


def _pipeline_settings() -> type:
    from tokdyn.upcycling.pipeline_settings import PipelineConfig

    return PipelineConfig


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "upcycle",
        settings=_settings,
        of_pipelines=_pipeline_settings,
        main=("out", "data.path", "training.steps"),
        examples=[
            "tokdyn upcycle --recipe shapes/upcycle out=runs/upcycled",
            "tokdyn upcycle --base runs/dit --method dc data.path=train.zip training.steps=2000 training.batch_size=64",
            "tokdyn upcycle --base DiT-XL/2 --method dc --method dydit --method cache data.path=latents --dry-run",
            "tokdyn upcycle --base black-forest-labs/FLUX.1-dev --method dc trained=lora rank=16 prompts=prompts.txt",
            "tokdyn upcycle out=runs/upcycled --resume",
        ],
    )
    def upcycle(
        ctx: typer.Context,
        base: Annotated[
            str | None, typer.Option(help="Pretrained model: a name, path or hub id. By default that of the recipe.")
        ] = None,
        method: Annotated[
            list[str] | None,
            typer.Option(
                help="dc or dydit, which are trained, or cache, skip=SHARE or merge=RATIO, which are attached after "
                "training. May be repeated."
            ),
        ] = None,
        recipe: Annotated[
            str | None,
            typer.Option(help="Recipe with a section `upcycle`. By default the shipped one for the methods."),
        ] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")] = False,
        dry_run: Annotated[
            bool,
            typer.Option(
                "--dry-run",
                help="Print the tensors to copy, parameters, FLOPs, memory and estimated time, and do not train.",
            ),
        ] = False,
        json: Json = False,
    ) -> str | None:
        """Build a DC-DiT from a pretrained DiT, and train it.

        By default it is trained by distillation from the DiT first, and then on its own.

        If the base is a text-to-image pipeline of diffusers, Chunking is attached to its transformer, which is trained
        on images that it draws itself to predict with fewer tokens what it predicts with all of them. The settings are
        then those of a pipeline: prompts=FILE, steps, lr, trained=lora; see docs/upcycling.md.
        """
        from tokdyn.bases.names import check_name, check_weights, names_pipeline
        from tokdyn.errors import RecipeError
        from tokdyn.files import user_path
        from tokdyn.recipe import Recipe, load
        from tokdyn.recipe.from_base import upcycling_recipe

        if names_pipeline(base):
            if recipe is not None:
                raise RecipeError(f"{base} is a pipeline, which is trained without a recipe; remove --recipe.")
            if dry_run:
                return _estimate(str(base), ctx.args, method or ["dc"], json)
            return _pipeline(str(base), ctx.args, method or ["dc"], resume, json)
        if base is not None:
            check_name(base)
            check_weights(base)
        given, cluster = take_cluster(split(ctx.args, frozenset(flags(Recipe))), dry_run)
        given.take()
        if resume and base is None and recipe is None and not method and "out" in given.settings:
            if not (user_path(given.settings["out"]) / "recipe.yaml").is_file():
                raise RecipeError(f"There is no run to resume in {given.settings['out']}; start it without --resume.")
            resolved = load(given.settings["out"], given.overrides())  # the recipe that the run was started with
        else:
            resolved = upcycling_recipe(base, recipe, given.overrides(), method or ())
        finished = carry_out(resolved, resume, dry_run, json, cluster)
        if not dry_run and not finished:
            return None
        if not dry_run:
            _page(Path(resolved.folder))
            return sampling(resolved)
        words = [
            base and f"--base={base}",
            recipe and f"--recipe={recipe}",
            *(f"--method={each}" for each in method or ()),
        ]
        return shell("tokdyn", "upcycle", *words, *given.overrides())


def _page(folder: Path) -> None:
    """Write the report of a finished run into its folder, if it can be sampled here, and name it on stderr."""
    from tokdyn.errors import TokdynError
    from tokdyn.run_report.build import report
    from tokdyn.run_report.settings import ReportConfig

    try:
        page = report(ReportConfig(out=folder / "report.html", count=8), [str(folder)])
    except TokdynError as error:
        typer.echo(f"No page was written: {error}", err=True)
    else:
        typer.echo(f"Report: {page}", err=True)


def _estimate(base: str, args: list[str], methods: list[str], json: bool) -> str:
    """Print what training the transformer of a pipeline takes, and return the command that trains it."""
    from tokdyn.upcycling.pipeline_settings import PipelineConfig

    given, cluster = take_cluster(split(args, frozenset(flags(PipelineConfig))), dry_run=True)
    given.take()
    config = read([*given.overrides(), f"base={base}"], PipelineConfig)
    from tokdyn.scaling import ScalingSettings
    from tokdyn.upcycling.dry_run import dry_run

    estimate = dry_run(config, methods, cluster or ScalingSettings(gpus=1))
    if json:
        as_json(estimate.as_dict())
    else:
        pairs(estimate.lines())
    words = [f"--base={base}", *(f"--method={each}" for each in methods)]
    return shell("tokdyn", "upcycle", *words, *given.overrides())


def _pipeline(base: str, args: list[str], methods: list[str], resume: bool, json: bool) -> str:
    """Upcycle a pipeline, print the error before and after, and return the command that draws with the result."""
    from tokdyn.upcycling.pipeline_settings import PipelineConfig

    config = read([*args, f"base={base}"], PipelineConfig)
    from tokdyn.upcycling.command import PAGE, upcycle_pipeline
    from tokdyn.upcycling.page import budget_columns
    from tokdyn.upcycling.pipelines import METHODS

    result = upcycle_pipeline(config, methods, resume, lambda text: typer.echo(text, err=True))
    if not result.report:
        return ""  # the first of several processes prints
    file = result.folder / METHODS
    following = shell("tokdyn", "sample", base, f"methods={file}", "prompts=prompts.txt")
    if json:
        as_json({"folder": result.folder, **result.report})
        return following
    error = result.report["error"]
    columns(budget_columns(result.report["budgets"]))
    typer.echo("")
    pairs(
        [
            (
                "error",
                f"{error['first']:.3f} before, {error['last']:.3f} after (mean square / variance of the teacher)",
            ),
            ("blocks", f"{result.report['share_of_block_flops']:.1%} of their FLOPs (a multiply-add is 2)"),
        ]
    )
    typer.echo(f"\n{file} is for tokdyn.load, and {result.folder / PAGE} shows images before and after.")
    return following
