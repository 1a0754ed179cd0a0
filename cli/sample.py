"""Define `tokdyn sample`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from tokdyn.progress import in_ms

from .arguments import split
from .frame import command, team_of
from .output import Json, as_json, shell, table
from .settings import check_model, flags, is_of_pipeline, read

if TYPE_CHECKING:
    from tokdyn.sample import BudgetResult

BUDGET_COLUMNS = ("tail drop", "images", "tokens kept", "GFLOPs", "ms")


def _settings() -> type:
    from tokdyn.sample import SampleConfig

    return SampleConfig


def _pipeline_settings() -> type:
    from tokdyn.sample.config import PipelineSampleConfig

    return PipelineSampleConfig


def budget_row(budget: BudgetResult) -> tuple[str, ...]:
    """Format the result of one tail drop as a row under BUDGET_COLUMNS."""
    return (
        f"{budget.tail_drop:g}",
        f"{budget.images}",
        "-" if budget.kept is None else f"{budget.kept:.1%}",
        "-" if budget.tflops_per_image is None else _digits(1e3 * budget.tflops_per_image),
        "-" if budget.images_per_second is None else in_ms(1 / budget.images_per_second),
    )


def _digits(value: float) -> str:
    """Format a number with at least three digits and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-3 else f"{value:.6f}"


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "sample",
        words=["MODEL"],
        settings=_settings,
        main=[
            "model",
            "out",
            "count",
            "classes",
            "seed",
            "steps",
            "guidance",
            "tail_drop",
            "methods",
            "maps",
            "device",
        ],
        of_pipelines=_pipeline_settings,
        together=True,
        examples=[
            "tokdyn sample runs/demo steps=25 guidance=2",
            "tokdyn sample runs/demo tail_drop=0,0.3,0.6 --maps out=budgets",
            "tokdyn sample runs/demo guidance=1.5 uncond_tail_drop=0.9 classes=star,ring",
            "tokdyn sample runs/demo steps=25 count=5000 format=npz --json",
            "tokdyn sample black-forest-labs/FLUX.1-dev prompts=prompts.txt methods=calibrated/flux precision=bf16",
        ],
    )
    def sample(ctx: typer.Context, json: Json = False) -> str:
        """Sample images from a trained model.

        With several tail drops (shares of the kept tokens that are dropped to save compute), the same images are
        sampled with each.

        A pipeline of diffusers, by folder or hub id, draws prompts with its own sampler, and has settings of its own.
        """
        from tokdyn.sample import SampleConfig

        if is_of_pipeline(ctx.args):
            return _pipeline(ctx, json)
        config = read(ctx.args, SampleConfig, ["model"])
        check_model(config.model)
        from tokdyn.sample import sample

        result = sample(config, team_of(ctx))
        if json:
            typer.echo(result.model_dump_json(indent=2))
        else:
            table(BUDGET_COLUMNS, map(budget_row, result.budgets))
            for path in (*result.files, *(file for budget in result.budgets for file in budget.files)):
                typer.echo(f"  {path}")
        if len(result.budgets) == 1 and result.budgets[0].kept is not None:
            given = split(ctx.args, set(flags(SampleConfig))).overrides()
            same = [
                each for each in given if not each.startswith(("model=", "out=", "tail_drop=", "drop_curve=", "maps="))
            ]
            return shell("tokdyn", "sample", config.model, *same, "tail_drop=0,0.3,0.6", "--maps", "out=budgets")
        return shell("tokdyn", "tune", config.model, "flops=0.6", f"steps={config.steps}")


def _pipeline(ctx: typer.Context, json: bool) -> str:
    """Draw prompts with a pipeline, print times and costs, and return the command to try next."""
    from dataclasses import asdict

    from tokdyn.sample.config import PipelineSampleConfig
    from tokdyn.sample.pipeline import sample_pipeline

    config = read(ctx.args, PipelineSampleConfig, ["model"])
    result = sample_pipeline(config, team_of(ctx))
    target = ("calibrate", config.model, "method=cache", "cache_steps=0.6") if config.methods is None else (
        "tune", config.model, "flops=0.5"
    )  # fmt: skip
    following = shell("tokdyn", *target, "prompts=prompts.txt")
    if json:
        as_json({"folder": result.folder, "drawn": [asdict(each) for each in result.drawn]})
        return following
    if result.table is not None:
        typer.echo(f"{result.table}\n")
    columns = ("prompt", "seed", "ms", "ms in the model", "reused", "FLOPs", "file")
    rows = [
        (
            title,
            each.seed,
            in_ms(each.seconds),
            "-" if each.denoiser_seconds is None else in_ms(each.denoiser_seconds),
            "-" if each.cached is None else each.cached,
            "-" if each.share is None else f"{each.share:.1%}",
            result.folder / each.file,
        )
        for title, each in zip(result.titles, result.drawn, strict=True)
    ]
    table(columns, rows)
    return following
