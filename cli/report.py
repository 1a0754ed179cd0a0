"""Define `tokdyn report` and `tokdyn plot`: show runs as a page, and as figures for papers."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from .arguments import split
from .frame import command
from .output import Json, as_json, files
from .settings import Settings, flags, read


def _report_settings() -> type:
    from tokdyn.run_report.settings import ReportConfig

    return ReportConfig


def _plot_settings() -> type:
    from tokdyn.run_report.settings import PlotConfig

    return PlotConfig


def _read(args: Sequence[str], settings: type[Settings]) -> tuple[tuple[str, ...], Settings]:
    """Return the positional words of a command, of which there must be one at least, and its settings."""
    from tokdyn.bases.names import check_name
    from tokdyn.bases.table import SHIPPED, rows
    from tokdyn.errors import RecipeError
    from tokdyn.files import require_path, user_path

    known = {*SHIPPED, *rows()}
    given = split(args, frozenset(flags(settings))).positional
    if not given:
        raise RecipeError("RUN is missing: give the folder of a run, or several; see the examples of --help.")
    config = read([word for word in args if word not in given], settings)
    for run in given:
        if run in known:
            check_name(run)
        else:
            require_path(user_path(run))
    return given, config


def register(app: typer.Typer) -> None:
    """Add both commands."""

    @command(
        app,
        "report",
        words=["RUN..."],
        settings=_report_settings,
        examples=[
            "tokdyn report runs/demo",
            "tokdyn report runs/dit runs/dc out=compared.html guidance=2 count=200",
            "tokdyn report runs/dc quality/night tail_drop=0,0.5",
        ],
    )
    def report(ctx: typer.Context, json: Json = False) -> None:
        """Write a page about runs: samples, keep maps, budgets, costs and curves.

        RUN is the folder of a run, a model that `tokdyn sample` takes, or a folder that bench quality, tune, calibrate
        or upcycle has written. Several are compared. The page is one HTML file that needs no network.
        """
        from tokdyn.run_report.settings import ReportConfig

        runs, config = _read(ctx.args, ReportConfig)
        from tokdyn.run_report.build import report

        path = report(config, runs)
        if json:
            as_json({"page": path})
            return
        files([path])
        typer.echo(f"Open it in a browser. Figures for a paper: tokdyn plot {' '.join(runs)}")

    @command(
        app,
        "plot",
        words=["RUN..."],
        settings=_plot_settings,
        examples=["tokdyn plot runs/demo", "tokdyn plot runs/dit runs/dc out=figures formats=pdf guidance=2"],
    )
    def plot(ctx: typer.Context, json: Json = False) -> None:
        """Draw the figures of a report as PNG, SVG and PDF, as wide as a column of a paper."""
        from tokdyn.run_report.settings import PlotConfig

        runs, config = _read(ctx.args, PlotConfig)
        from tokdyn.run_report.figures import plot

        paths = plot(config, runs)
        if json:
            as_json({"files": list(paths)})
            return
        files(paths)
        typer.echo(f"The same as a page: tokdyn report {' '.join(runs)}")
