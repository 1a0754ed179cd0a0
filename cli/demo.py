"""Define `tokdyn demo`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from .frame import command
from .output import Json, as_json, table
from .sample import BUDGET_COLUMNS, budget_row
from .settings import read

if TYPE_CHECKING:
    from tokdyn.demo import RouterScore


def _settings() -> type:
    from tokdyn.demo import DemoSettings

    return DemoSettings


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(app, "demo", settings=_settings, examples=["tokdyn demo", "tokdyn demo out=/tmp/demo training_steps=800"])
    def demo(ctx: typer.Context, json: Json = False) -> None:
        """Train a small DC-DiT, sample it, and draw pictures.

        It is sampled with three tail drops (shares of the kept tokens that are dropped to save compute), and its router
        is scored.
        """
        from tokdyn.demo import DemoSettings, demo

        result = demo(read(ctx.args, DemoSettings))
        if json:
            as_json({**asdict(result), "samples": result.samples.model_dump(mode="json")})
            return
        typer.echo(f"\nThe model in {result.folder} is trained for {result.steps} of {result.planned} steps.")
        if result.steps < result.planned:
            typer.echo("The time limit stopped the training; repeat the command to resume it.")
        typer.echo("\nCost with each tail drop (one image, all sampling steps; a multiply-add is 2 FLOPs):")
        table(BUDGET_COLUMNS, map(budget_row, result.samples.budgets))
        typer.echo("\nDetail that the router keeps (in images outside the training set, whose detail is known):")
        table(["noise level", "tokens kept", "detail kept", "best possible", "times chance"], map(_row, result.router))
        typer.echo("\nPictures:")
        for path in result.pictures:
            typer.echo(f"  {path}")
        typer.echo(f"\nSample more: tokdyn sample {result.folder} steps=25 guidance=2 tail_drop=0.3")


def _row(score: RouterScore) -> tuple[str, ...]:
    """Format a row of the table of router scores."""
    shares = (score.detail.kept, score.detail.recall, score.detail.best)
    return (f"{score.level:.2f}", *(f"{share:.1%}" for share in shares), f"{score.detail.lift:.2f}")
