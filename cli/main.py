"""Entry point of the `tokdyn` command: one file per command, imported here, each of them free of model code."""

from __future__ import annotations

from typing import Annotated

import typer

import tokdyn

from . import models, recipes
from .frame import group

app = group("tokdyn", "Dynamic token computation for diffusion transformers: train, sample and measure DC-DiT and DiT.")
models.register(app)
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
    app(prog_name="tokdyn")


if __name__ == "__main__":
    main()
