"""Define the entry point of the `tokdyn` command. It imports all commands, which load model code when they run."""

from __future__ import annotations

import os
from typing import Annotated

import typer

import tokdyn

from . import bench, calibrate, convert, demo, features, methods, models, presets, recipes, sample, train, tune, upcycle
from . import eval as evaluation
from . import report as reports
from .frame import group

app = group("tokdyn", "Dynamic token computation for diffusion transformers: train, sample and measure DC-DiT and DiT.")
for part in (
    demo,
    features,
    train,
    upcycle,
    sample,
    calibrate,
    tune,
    evaluation,
    reports,
    convert,
    models,
    methods,
    presets,
):
    part.register(app)
app.add_typer(bench.app)
app.add_typer(recipes.app)


def _print_version(wanted: bool) -> None:
    """Print the version and exit, if --version was given."""
    if wanted:
        typer.echo(f"tokdyn {tokdyn.__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Dynamic token computation for diffusion transformers: train, sample and measure DC-DiT and DiT."""


def main() -> None:
    """Run the command line."""
    # Set before torch is imported: idle OpenMP threads then sleep after about 0.1 ms. By default they spin for 10 ms,
    # which makes tokdyn five times slower on a machine that also does other work.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    app(prog_name="tokdyn")


if __name__ == "__main__":
    main()
