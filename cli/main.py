"""Define the entry point of the `tokdyn` command. It imports all commands, which load model code when they run."""

from __future__ import annotations

import os
import sys
from typing import Annotated

try:
    import typer

    import tokdyn

    from . import (
        bench,
        calibrate,
        convert,
        demo,
        doctor,
        features,
        methods,
        models,
        pages,
        playground,
        presets,
        recipes,
        sample,
        train,
        tune,
        upcycle,
    )
    from . import eval as evaluation
    from . import report as reports
    from .frame import group
except KeyboardInterrupt:  # Ctrl-C before there is a command that could answer it
    print("Interrupted.", file=sys.stderr)
    sys.exit(130)

WHAT = (
    "Diffusion transformers that compute fewer tokens, blocks and steps. tokdyn attaches methods to the pipelines and "
    "models that you have, and trains DC-DiT, which decides image by image which tokens are worth computing."
)
FIRST = {
    "tokdyn demo": "a first look at what it does, with pictures",
    "tokdyn doctor": "what works on this machine, and what to install",
    "tokdyn train photos/": "a proposal for training on your images",
}
"""The commands that `tokdyn` alone shows, and what each does."""

app = group("tokdyn", WHAT, completion=True)
for part in (
    demo, doctor, train, sample, calibrate, tune, upcycle, features, evaluation, reports, playground, convert, models,
    methods, presets,
):  # fmt: skip
    part.register(app)
app.add_typer(bench.app)
app.add_typer(recipes.app)


def _print_version(wanted: bool) -> None:
    """Print the version and exit, if --version was given."""
    if wanted:
        typer.echo(f"tokdyn {tokdyn.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True, help=WHAT)
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Show what tokdyn is for and where to start, if no command is given."""
    if ctx.invoked_subcommand is None:
        lines = [f"tokdyn {tokdyn.__version__}", "", *pages.paragraphs(WHAT)]
        lines += pages.section("To begin with", pages.definitions(FIRST.items()))
        lines += ["", "All commands: tokdyn --help", "Completion by the tab key: tokdyn --install-completion"]
        typer.echo("\n".join(lines))


def main() -> None:
    """Run the command line."""
    # Set before torch is imported: idle OpenMP threads then sleep after about 0.1 ms. By default they spin for 10 ms,
    # which makes tokdyn five times slower on a machine that also does other work.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    app(prog_name="tokdyn")


if __name__ == "__main__":
    main()
