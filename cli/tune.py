"""Define `tokdyn tune`."""

from __future__ import annotations

import typer

from . import output
from .frame import command
from .output import Json
from .settings import is_of_pipeline, read


def _settings() -> type:
    from tokdyn.bench.tune_settings import TuneConfig

    return TuneConfig


def _pipeline_settings() -> type:
    from tokdyn.bench.tune_settings import PipelineTuneConfig

    return PipelineTuneConfig


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "tune",
        words=["MODEL"],
        settings=_settings,
        of_pipelines=_pipeline_settings,
        examples=[
            "tokdyn tune runs/demo flops=0.6 steps=25 guidance=2",
            "tokdyn tune runs/dc flops=0.5 knobs=drop,uncond guidance=1.5 extractor=judge.ts reference=test.zip",
            "tokdyn tune DiT-XL-2-256 flops=0.5 knobs=merge,skip,cache steps=50 guidance=4 device=cuda out=tuned/xl",
            "tokdyn tune black-forest-labs/FLUX.1-dev flops=0.5 prompts=prompts.txt precision=bf16",
        ],
    )
    def tune(ctx: typer.Context, json: Json = False) -> None:
        """Find the best methods for a share of the FLOPs.

        The search tries tail drops, merging, skipping and caching with settings that may change with the noise level.
        The best of them is written as a stack (a list of methods), and the command that samples with it is printed. On
        a pipeline of diffusers, merging, skipping and caching are tuned on prompts.
        """
        if is_of_pipeline(ctx.args):
            _pipeline(ctx.args, json)
            return
        from tokdyn.bench.quality_page import columns
        from tokdyn.bench.tune import tune
        from tokdyn.bench.tune_settings import TuneConfig
        from tokdyn.files import json_object

        result = tune(read(ctx.args, TuneConfig, ["model"]))
        if json:
            typer.echo((result.folder / "tuned.json").read_text(encoding="utf-8").rstrip())
            return
        output.columns(columns(result.quality.rows))
        content = json_object(result.folder / "tuned.json")
        typer.echo(f"\n  {content['sample']}\n")
        output.files(result.folder / name for name in ("stack.yaml", "tuned.json", "quality.html"))


def _pipeline(args: list[str], json: bool) -> None:
    """Tune methods on a pipeline, and print what was found."""
    from tokdyn.bench.tune_pipeline import tune_pipeline
    from tokdyn.bench.tune_settings import PipelineTuneConfig

    result = tune_pipeline(read(args, PipelineTuneConfig, ["model"]))
    if json:
        typer.echo((result.folder / "tuned.json").read_text(encoding="utf-8").rstrip())
        return
    output.columns(result.compared.columns())
    typer.echo(f"\n  {result.command}\n")
    output.files(result.folder / name for name in ("stack.yaml", "tuned.json", "quality.html"))
