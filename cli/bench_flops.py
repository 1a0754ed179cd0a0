"""`tokdyn bench flops`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from . import output
from .frame import command
from .output import Json, as_json, table
from .settings import read


def _settings() -> type:
    from tokdyn.bench.flops import FlopsConfig

    return FlopsConfig


def register(app: typer.Typer) -> None:
    """Adds the command."""

    @command(
        app,
        "flops",
        words=["[MODELS]"],
        settings=_settings,
        examples=[
            "tokdyn bench flops",
            "tokdyn bench flops DiT-XL/2,DC-DiT-XL guidance=1.25 uncond_tail_drop=0.9 plot=flops.png",
            "tokdyn bench flops runs/demo steps=25 guidance=2 --json",
            'tokdyn bench flops --stack "{name: merged, model: runs/dit, methods: [{method: TokenMerge, ratio: 0.3}]}"',
            "tokdyn bench flops --paper",
        ],
    )
    def flops(
        ctx: typer.Context,
        stack: Annotated[
            list[str] | None, typer.Option(help="A YAML file with a list of stacks, or one as YAML; repeat it.")
        ] = None,
        paper: Annotated[
            bool, typer.Option("--paper", help="Put what arXiv 2603.06351 prints beside what is computed.")
        ] = False,
        json: Json = False,
    ) -> None:
        """Work out what models and stacks cost, by part, and check it against torch's counter.

        A multiply-add is 2 FLOPs. Named models have no trained weights: DC-DiT is taken at 1/N of its tokens or at
        kept=SHARE. Of checkpoints the tokens are measured on images that they draw.
        """
        from tokdyn.bench.flops import FlopsConfig, bench_flops, compare_with_paper
        from tokdyn.bench.flops_table import columns, draw_parts, write_csv
        from tokdyn.bench.stacks import read_stacks

        config = read(ctx.args, FlopsConfig, ["models"])
        if paper:
            found = compare_with_paper(config)
            if json:
                as_json({"units": "a multiply-add is 2 FLOPs", "rows": found})
                return
            table(list(found[0]), [["-" if value is None else value for value in row.values()] for row in found])
            return
        rows = bench_flops(config, read_stacks(stack or []))
        files = [write_csv(rows, config.csv)] if config.csv else []
        if config.plot:
            files.append(draw_parts(rows, config.plot))
        if json:
            as_json({"units": "a multiply-add is 2 FLOPs", "models": [asdict(row) for row in rows]})
            return
        output.columns(columns(rows))
        typer.echo(f"\n{config.steps} steps; a multiply-add is 2 FLOPs.")
        output.files(files)
