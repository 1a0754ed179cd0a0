"""Entry point of the `tokdyn` command: one file per command, imported here, each of them free of model code."""

from __future__ import annotations

import os
from typing import Annotated

import typer

import tokdyn

from . import bench, calibrate, convert, demo, features, methods, models, recipes, sample, train, tune, upcycle
from . import eval as evaluation
from .frame import group

app = group("tokdyn", "Dynamic token computation for diffusion transformers: train, sample and measure DC-DiT and DiT.")
for part in (demo, features, train, upcycle, sample, calibrate, tune, evaluation, convert, models, methods):
    part.register(app)
app.add_typer(bench.app)
app.add_typer(recipes.app)


def _print_version(wanted: bool) -> None:
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
    """Runs the command line."""
    # Before torch is loaded: idle OpenMP threads wait in the kernel after about 0.1 ms instead of spinning for 10 ms,
    # which slows a machine that does other work too to a fifth.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    app(prog_name="tokdyn")


if __name__ == "__main__":
    main()
