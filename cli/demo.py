"""Define `tokdyn demo`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from .frame import command
from .output import Json, as_json, files, paragraph, shell, table
from .sample import BUDGET_COLUMNS, budget_row
from .settings import read

if TYPE_CHECKING:
    from tokdyn.demo import DemoSettings, RouterScore, ShownRow


def _settings() -> type:
    from tokdyn.demo import DemoSettings

    return DemoSettings


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "demo",
        settings=_settings,
        examples=["tokdyn demo", "tokdyn demo --train", "tokdyn demo --train out=/tmp/demo training_steps=800"],
    )
    def demo(ctx: typer.Context, json: Json = False) -> str:
        """Show what tokdyn does, with the small models that ship with it.

        A DC-DiT is sampled at four budgets (shares of the kept tokens that are dropped to save compute), without and
        with Lite-CFG (a smaller budget for the unconditional branch of guidance), and a DiT with two stacks of
        methods. One table says what each costs, and report.html shows the images.

        With --train, or if no models are installed, it trains a small DC-DiT in minutes, samples it with three tail
        drops, draws pictures and scores its router.
        """
        from tokdyn.demo import DemoSettings

        settings = read(ctx.args, DemoSettings)
        return _train(settings, json) if settings.trains else _show(settings, json)


def _show(settings: DemoSettings, json: bool) -> str:
    """Show the shipped models, and return the command to try next."""
    from tokdyn.demo import show

    result = show(settings)
    model = result.rows[0].model
    following = shell(
        "tokdyn", "sample", model, f"steps={result.steps}", f"guidance={result.guidance:g}",
        "tail_drop=0,0.6", "--maps", "out=budgets",
    )  # fmt: skip
    if json:
        as_json(asdict(result))
        return following
    table(["model", "setting", "tokens", "GFLOPs", "ms", "PSNR, dB"], map(_shown_row, result.rows))
    paragraph(
        "Per image, all steps and both guidance branches; a multiply-add is 2 FLOPs. Tokens are those that the blocks "
        "compute in a call, of all tokens of the image. PSNR says how near the images are to those of the same model's "
        "first row, from the same seeds: higher is nearer."
    )
    typer.echo("\nOpen this page in a browser:")
    files([result.page])
    typer.echo("\nThen:")
    typer.echo("  tokdyn demo --train     train such a model in minutes, and score its router")
    typer.echo("  tokdyn models           models and families, and what works on them")
    return following


def _shown_row(row: ShownRow) -> tuple[str, ...]:
    """Format a row of the table of shipped models."""
    return (
        row.model,
        row.setting,
        f"{row.tokens:.0f} of {row.cells}",
        "-" if row.gflops is None else f"{row.gflops:.2f}",
        f"{row.milliseconds:.0f}",
        "-" if row.psnr is None else f"{row.psnr:.1f}",
    )


def _train(settings: DemoSettings, json: bool) -> str:
    """Train a model, sample it and score its router, and return the command to try next."""
    from tokdyn.demo import demo

    if settings.train is None:
        typer.echo("This installation holds no models to show, so one is trained.", err=True)
    result = demo(settings)
    following = shell("tokdyn", "report", result.folder)
    if json:
        as_json({**asdict(result), "samples": result.samples.model_dump(mode="json")})
        return following
    typer.echo(f"\nThe model in {result.folder} is trained for {result.steps} of {result.planned} steps.")
    if result.steps < result.planned:
        typer.echo("The time limit stopped the training; repeat the command to resume it.")
    typer.echo("\nCost with each tail drop (one image, all sampling steps; a multiply-add is 2 FLOPs):")
    table(BUDGET_COLUMNS, map(budget_row, result.samples.budgets))
    typer.echo("\nDetail that the router keeps (in images outside the training set, whose detail is known):")
    table(
        ["noise level", "tokens kept", "detail kept", "best possible", "times chance", "ROC area", "largest area"],
        map(_score_row, result.router),
    )
    typer.echo("\nPictures:")
    files(result.pictures)
    typer.echo(f"\nSample more: tokdyn sample {result.folder} steps=25 guidance=2 tail_drop=0.3")
    return following


def _score_row(score: RouterScore) -> tuple[str, ...]:
    """Format a row of the table of router scores."""
    shares = (score.detail.kept, score.detail.recall, score.detail.best)
    areas = (score.area, score.best_area)
    return (
        f"{score.level:.2f}",
        *(f"{share:.1%}" for share in shares),
        f"{score.detail.lift:.2f}",
        *(f"{area:.3f}" for area in areas),
    )
