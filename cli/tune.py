"""Define `tokdyn tune`."""

from __future__ import annotations

import typer

from . import output
from .frame import command
from .output import Json
from .settings import check_model, is_of_pipeline, read


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
        main=["model", "flops", "knobs", "steps", "guidance", "images", "count", "finalists", "device", "out"],
        of_pipelines=_pipeline_settings,
        examples=[
            "tokdyn tune runs/demo flops=0.6 steps=25 guidance=2",
            "tokdyn tune runs/dc flops=0.5 knobs=drop,uncond guidance=1.5 extractor=judge.ts reference=test.zip",
            "tokdyn tune DiT-XL-2-256 flops=0.5 knobs=merge,skip,cache steps=50 guidance=4 device=cuda out=tuned/xl",
            "tokdyn tune black-forest-labs/FLUX.1-dev flops=0.5 prompts=prompts.txt precision=bf16",
        ],
    )
    def tune(ctx: typer.Context, json: Json = False) -> str:
        """Find the best methods for a share of the FLOPs.

        The search tries tail drops, merging, skipping and caching with settings that may change with the noise level.
        The best of them is written as a stack (a list of methods), and the command that samples with it is printed. On
        a pipeline of diffusers, merging, skipping and caching are tuned on prompts.
        """
        if is_of_pipeline(ctx.args):
            return _pipeline(ctx.args, json)
        from tokdyn.bench.tune_settings import TuneConfig

        config = read(ctx.args, TuneConfig, ["model"])
        check_model(config.model)
        from tokdyn.bench.quality_page import columns
        from tokdyn.bench.tune import tune
        from tokdyn.files import json_object

        result = tune(config)
        if json:
            typer.echo((result.folder / "tuned.json").read_text(encoding="utf-8").rstrip())
        else:
            output.columns(columns(result.quality.rows))
            output.files(result.folder / name for name in ("stack.yaml", "tuned.json", "quality.html"))
        return str(json_object(result.folder / "tuned.json")["sample"])


def _pipeline(args: list[str], json: bool) -> str:
    """Tune methods on a pipeline, print what was found, and return the command that draws with it."""
    from tokdyn.bench.tune_pipeline import tune_pipeline
    from tokdyn.bench.tune_settings import PipelineTuneConfig

    result = tune_pipeline(read(args, PipelineTuneConfig, ["model"]))
    if json:
        typer.echo((result.folder / "tuned.json").read_text(encoding="utf-8").rstrip())
    else:
        output.columns(result.compared.columns())
        output.files(result.folder / name for name in ("stack.yaml", "tuned.json", "quality.html"))
    return result.command
