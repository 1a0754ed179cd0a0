"""Define `tokdyn bench flops`, `tokdyn bench speed` and `tokdyn bench quality`.

A stack is a list of methods that act together on a model.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from . import output
from .frame import command, group, team_of
from .output import Json, as_json
from .settings import check_model, check_stacks, is_of_pipeline, read

app = group("bench", "Measure cost, speed and quality of models and stacks.")
UNITS = "a multiply-add is 2 FLOPs"
Stacks = Annotated[
    list[str] | None,
    typer.Option("--stack", help="A YAML file with a list of stacks, or one stack as YAML; repeat it for more."),
]


def _flops_settings() -> type:
    from tokdyn.bench.settings import FlopsConfig

    return FlopsConfig


def _speed_settings() -> type:
    from tokdyn.bench.settings import SpeedConfig

    return SpeedConfig


def _quality_settings() -> type:
    from tokdyn.bench.settings import QualityConfig

    return QualityConfig


def _pipeline_settings() -> type:
    from tokdyn.bench.settings import PipelineBenchConfig

    return PipelineBenchConfig


@command(
    app,
    "flops",
    words=["[MODELS]"],
    settings=_flops_settings,
    main=["models", "kept", "tail_drop", "uncond_tail_drop", "guidance", "steps", "sample_size", "csv", "plot"],
    examples=[
        "tokdyn bench flops",
        "tokdyn bench flops DiT-XL/2,DC-DiT-XL guidance=1.25 uncond_tail_drop=0.9 plot=flops.png",
        "tokdyn bench flops runs/demo steps=25 guidance=2 --json",
        'tokdyn bench flops --stack "{name: merged, model: runs/dit, methods: [{method: merge}]}"',
        "tokdyn bench flops --paper",
    ],
)
def flops(
    ctx: typer.Context,
    stack: Stacks = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Compare the costs printed in arXiv 2603.06351 with the computed ones.")
    ] = False,
    json: Json = False,
) -> str:
    """Compute the FLOPs of models and stacks by part.

    A stack is a list of methods that act together on a model. The FLOPs are checked with torch's counter; a
    multiply-add is 2 FLOPs. Named models such as DC-DiT-S have no trained weights, so they are taken to keep 1/N of
    their tokens, or kept=SHARE. For checkpoints, the kept share is measured on images that they draw.
    """
    from tokdyn.bench.settings import FlopsConfig

    config = read(ctx.args, FlopsConfig, ["models"])
    for name in config.models or ():
        check_model(name, sizes=True)
    check_stacks(stack)
    from tokdyn.bench.flops import bench_flops
    from tokdyn.bench.flops_table import columns, draw_parts, write_csv
    from tokdyn.bench.published import compare_with_paper, paper_columns
    from tokdyn.bench.stacks import read_stacks

    if paper:
        comparison = compare_with_paper(config)
        if json:
            as_json({"units": UNITS, "rows": comparison})
        else:
            output.columns(paper_columns(comparison))
        return "tokdyn bench flops"
    rows = bench_flops(config, read_stacks(stack or []))
    files = [write_csv(rows, config.csv)] if config.csv else []
    if config.plot:
        files.append(draw_parts(rows, config.plot))
    if json:
        as_json({"units": UNITS, "models": [asdict(row) for row in rows]})
    else:
        output.columns(columns(rows))
        typer.echo(f"\n{config.steps} steps; {UNITS}.")
        output.files(files)
    return output.shell("tokdyn", "bench", "speed", config.models[0] if config.models else "DC-DiT-S", "kept=0.25")


@command(
    app,
    "speed",
    words=["[MODEL]"],
    settings=_speed_settings,
    main=["model", "batch", "size", "kept", "precision", "mode", "compile", "rounds", "device", "out", "plot"],
    of_pipelines=_pipeline_settings,
    examples=[
        "tokdyn bench speed DC-DiT-S kept=0.25 batch=1,8 precision=fp32,bf16 memory=true",
        'tokdyn bench speed --stack "{name: a, model: DiT-S/2}" --stack "{name: b, model: DC-DiT-S}" mode=train',
        "tokdyn bench speed DC-DiT-tiny size=16,32,64,128 batch=1 plot=scaling.png --json",
        'tokdyn bench speed Wan-AI/Wan2.1-T2V-1.3B-Diffusers --stack "{name: merged, methods: [{method: TokenMerge}]}"',
    ],
)
def speed(ctx: typer.Context, stack: Stacks = None, json: Json = False) -> str:
    """Time models and stacks in turn.

    A stack is a list of methods that act together on a model. All stacks are compared with the first one: the time that
    they save, and the FLOPs that they save. On a pipeline of diffusers, whole calls are timed without methods and with
    each stack in turn.
    """
    if is_of_pipeline(ctx.args):
        return _pipeline(ctx.args, stack, json, timed=True)
    from tokdyn.bench.settings import SpeedConfig

    config = read(ctx.args, SpeedConfig, ["model"])
    check_model(config.model, sizes=True)
    check_stacks(stack)
    from tokdyn.bench.speed import bench_speed
    from tokdyn.bench.speed_table import columns, content, draw
    from tokdyn.bench.stacks import Stack, read_stacks
    from tokdyn.bench.timing import write

    stacks = read_stacks(stack) if stack else (Stack(name=config.model or "model"),)
    rows = bench_speed(config, stacks)
    result = content(config, rows)
    files = [draw(rows, config.plot)] if config.plot else []
    if config.out:
        write(config.out, result)
        files.append(config.out)
    if json:
        as_json(result)
    else:
        output.columns(columns(rows))
        for along, lines in result["growth"].items():
            for name, exponent in lines.items():
                typer.echo(f"time grows with {along} to the power of {exponent:.2f}: {name}")
        output.files(files)
    return "tokdyn bench flops" if config.model is None else output.shell("tokdyn", "bench", "flops", config.model)


@command(
    app,
    "quality",
    words=["[MODEL]"],
    together=True,
    settings=_quality_settings,
    main=["model", "out", "count", "steps", "guidance", "held_out", "reference", "extractor", "rounds", "device"],
    of_pipelines=_pipeline_settings,
    examples=[
        'tokdyn bench quality runs/demo --stack "{name: plain}" --stack "{name: dropped, tail_drop: 0.5}"',
        "tokdyn bench quality runs/dc --stack stacks.yaml extractor=judge.ts reference=test.zip guidance=1.5",
        "tokdyn bench quality --stack stacks.yaml held_out=test.zip rounds=9 out=quality/night --json",
        "tokdyn bench quality black-forest-labs/FLUX.1-dev --stack stacks.yaml prompts=prompts.txt precision=bf16",
    ],
)
def quality(ctx: typer.Context, stack: Stacks = None, json: Json = False) -> str:
    """Compare image quality, FLOPs and time of stacks.

    A stack is a list of methods that act together on a model. All stacks draw images from the same seeds, and are
    compared with the first one. On a pipeline of diffusers, prompts are drawn without methods and with each stack, and
    the page shows the pairs side by side.
    """
    if is_of_pipeline(ctx.args):  # pairs are timed in turn, so one process draws them
        return _pipeline(ctx.args, stack, json, timed=False) if team_of(ctx).first else ""
    from tokdyn.bench.settings import QualityConfig

    config = read(ctx.args, QualityConfig, ["model"])
    check_model(config.model)
    check_stacks(stack)
    from tokdyn.bench.quality import bench_quality
    from tokdyn.bench.quality_page import columns, write_page
    from tokdyn.bench.stacks import read_stacks

    result = bench_quality(config, read_stacks(stack or ["{name: plain}"]), team_of(ctx))
    if not team_of(ctx).first:
        return ""
    files = write_page(config, result)
    if json:
        typer.echo(files[0].read_text(encoding="utf-8").rstrip())
    else:
        output.columns(columns(result.rows))
        output.files(files)
    return output.shell("tokdyn", "tune", config.model or "RUN", "flops=0.6", f"steps={config.steps}")


def _pipeline(args: list[str], stack: list[str] | None, json: bool, timed: bool) -> str:
    """Compare stacks on a pipeline, print or write the result, and return the command to try next."""
    from tokdyn.bench.settings import PipelineBenchConfig

    config = read(args, PipelineBenchConfig, ["model"])
    check_stacks(stack, models=False)
    from tokdyn.bench.pipelines import UNITS, bench_pipeline, write_pipeline_page
    from tokdyn.bench.stacks import read_stacks

    result = bench_pipeline(config, read_stacks(stack or []), timed)
    files = () if timed else write_pipeline_page(config, result)
    if json:
        as_json(result.as_dict())
    else:
        found = result.columns()
        output.columns({name: found[name] for name in found if not (timed and name in ("PSNR, dB", "SSIM"))})
        typer.echo(f"\nMedian times of whole calls; {UNITS}.")
        output.files(files)
    return output.shell("tokdyn", "tune", config.model, "flops=0.6", "prompts=prompts.txt")
