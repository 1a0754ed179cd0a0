"""`tokdyn bench quality`."""

from __future__ import annotations

import typer

from . import output
from .frame import command
from .output import Json
from .settings import read
from .stacks import Stacks


def _settings() -> type:
    from tokdyn.bench.quality import QualityConfig

    return QualityConfig


def register(app: typer.Typer) -> None:
    """Adds the command."""

    @command(
        app,
        "quality",
        words=["[MODEL]"],
        settings=_settings,
        examples=[
            'tokdyn bench quality runs/demo --stack "{name: plain}" --stack "{name: dropped, tail_drop: 0.5}"',
            "tokdyn bench quality runs/dc --stack stacks.yaml extractor=judge.ts reference=test.zip guidance=1.5",
            "tokdyn bench quality --stack stacks.yaml held_out=test.zip rounds=9 out=quality/night --json",
        ],
    )
    def quality(
        ctx: typer.Context,
        stack: Stacks = None,
        json: Json = False,
    ) -> None:
        """Measure what stacks of methods do to the images, what they cost, and how long they take."""
        from tokdyn.bench.quality import QualityConfig, bench_quality
        from tokdyn.bench.quality_page import columns, write_page
        from tokdyn.bench.stacks import read_stacks

        config = read(ctx.args, QualityConfig, ["model"])
        result = bench_quality(config, read_stacks(stack or ["{name: plain}"]))
        files = write_page(config, result)
        if json:
            typer.echo(files[0].read_text(encoding="utf-8").rstrip())
            return
        output.columns(columns(result.rows))
        output.files(files)
