"""The option of commands that compare stacks of methods."""

from __future__ import annotations

from typing import Annotated

import typer

Stacks = Annotated[
    list[str] | None,
    typer.Option(help="A YAML file with a list of stacks, or one as YAML; others are held to the first."),
]
