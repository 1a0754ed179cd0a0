"""Define `tokdyn calibrate`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from .frame import command
from .output import Json, as_json, pairs, shell, table
from .settings import check_model, read

if TYPE_CHECKING:
    from tokdyn.calibration.command import CalibrateResult


def _settings() -> type:
    from tokdyn.calibration.config import CalibrateConfig

    return CalibrateConfig


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "calibrate",
        words=["MODEL"],
        settings=_settings,
        main=["model", "method", "flops", "cache_steps", "steps", "guidance", "prompts", "count", "device", "out"],
        examples=[
            "tokdyn calibrate runs/demo method=skip flops=0.7 steps=25",
            "tokdyn calibrate DiT-XL-2-256 method=skip flops=0.7 steps=50 guidance=4 protected=0,-1 --sequential",
            "tokdyn calibrate black-forest-labs/FLUX.1-dev method=cache cache_steps=0.6 prompts=prompts.txt",
            "tokdyn calibrate black-forest-labs/FLUX.1-dev method=mag cache_steps=0.5 prompts=prompts.txt steps=28",
            "tokdyn calibrate DiT-XL-2-256 method=cache cache_steps=0.5 steps=50 guidance=4 out=calibrated/xl",
        ],
    )
    def calibrate(ctx: typer.Context, json: Json = False) -> str:
        """Calibrate DepthSkip or FeatureCache for a model.

        The blocks to skip, or the threshold of the cache, are chosen by measurements on sampled images. Of a pipeline
        with several denoisers, each is calibrated on the calls that it gets. What was found is written as a folder for
        tokdyn.load and as a preset file, preset.yaml, for tokdyn.wrap.
        """
        from tokdyn.calibration.config import CalibrateConfig

        config = read(ctx.args, CalibrateConfig, ["model"])
        check_model(config.model)
        from tokdyn.calibration.command import calibrate_from_disk

        found = calibrate_from_disk(config)
        name, first = next(iter(found.items()))
        folder = first.folder.parent if name else first.folder
        if json:
            reports = {name: {"folder": each.folder, **each.report} for name, each in found.items()}
            as_json(reports.get("", {"denoisers": reports}))
        else:
            for name, each in found.items():
                if name:
                    typer.echo(f"{name}:")
                _show(each)
            typer.echo(f"As a preset: {folder / 'preset.yaml'}")
        drawn = "prompts=prompts.txt" if config.prompts is not None else f"steps={config.steps}"
        return shell("tokdyn", "sample", config.model, f"methods={folder}", drawn)


def _show(result: CalibrateResult) -> None:
    """Print what was found for a model."""
    report = result.report
    if report["settings"]["method"] == "skip":
        table(["noise level", "skipped blocks", "error of the output"], map(_row, reversed(report["levels"])))
    elif report["settings"]["method"] == "mag":
        ratios = report["ratios"]
        pairs(
            [
                ("ratios", ", ".join(f"{ratio:.3f}" for ratio in ratios["mean"])),
                ("differ", f"by {ratios['deviation']:.2g} over images, by {ratios['difference']:.2g} over branches"),
                ("threshold", f"{report['method']['threshold']:.4g}"),
                ("blocks run in", f"{report['computed_steps']:.1%} of the steps"),
            ]
        )
    else:
        method = report["method"]
        pairs(
            [
                ("polynomial", ", ".join(f"{c:.4g}" for c in method["coefficients"])),
                ("explains", f"{report['explained_variance']:.1%} of the variance"),
                ("threshold", f"{method['threshold']:.4g}"),
                ("blocks run in", f"{report['computed_steps']:.1%} of the steps"),
            ]
        )
    typer.echo(f"\n{report['flops']:.1%} of the FLOPs remain (a multiply-add is 2 FLOPs). In {result.folder}:")
    for name in ("tokdyn_config.json", "calibration.json", "calibration.html"):
        typer.echo(f"  {result.folder / name}")


def _row(level: dict[str, Any]) -> tuple[str, str, str]:
    """Format a row of the table of skipped blocks: a range of noise levels, the blocks, and the error."""
    blocks = ", ".join(map(str, level["skipped"])) or "-"
    return f"{level['low']:.2f} to {level['high']:.2f}", blocks, f"{level['relative_error']:.4f}"
