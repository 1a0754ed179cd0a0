"""`tokdyn bench speed`."""

from __future__ import annotations

import typer

from . import output
from .frame import command
from .output import Json, as_json
from .settings import read
from .stacks import Stacks


def _settings() -> type:
    from tokdyn.bench.speed import SpeedConfig

    return SpeedConfig


def register(app: typer.Typer) -> None:
    """Adds the command."""

    @command(
        app,
        "speed",
        words=["[MODEL]"],
        settings=_settings,
        examples=[
            "tokdyn bench speed DC-DiT-S kept=0.25 batch=1,8 precision=fp32,bf16 memory=true",
            'tokdyn bench speed --stack "{name: a, model: DiT-S/2}" --stack "{name: b, model: DC-DiT-S}" mode=train',
            "tokdyn bench speed DC-DiT-tiny size=16,32,64,128 batch=1 plot=scaling.png --json",
        ],
    )
    def speed(
        ctx: typer.Context,
        stack: Stacks = None,
        json: Json = False,
    ) -> None:
        """Time models and stacks of methods in turn, beside what their FLOPs promise."""
        from tokdyn.bench.speed import SpeedConfig, bench_speed
        from tokdyn.bench.speed_table import columns, content, draw
        from tokdyn.bench.stacks import Stack, read_stacks

        config = read(ctx.args, SpeedConfig, ["model"])
        stacks = read_stacks(stack) if stack else (Stack(name=config.model or "model"),)
        rows = bench_speed(config, stacks)
        found = content(config, rows)
        files = [draw(rows, config.plot)] if config.plot else []
        if config.out:
            from tokdyn.bench.timing import write

            write(config.out, found)
            files.append(config.out)
        if json:
            as_json(found)
            return
        output.columns(columns(rows))
        for along, lines in found["growth"].items():
            for name, exponent in lines.items():
                typer.echo(f"time grows with {along} to the power of {exponent:.2f}: {name}")
        output.files(files)
