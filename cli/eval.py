"""Define `tokdyn eval`."""

from __future__ import annotations

import typer

from .frame import command, team_of
from .output import Json, shell, table
from .settings import read


def _settings() -> type:
    from tokdyn.evaluate import EvalConfig

    return EvalConfig


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "eval",
        words=["GENERATED", "[REFERENCE]"],
        together=True,
        settings=_settings,
        main=["generated", "reference", "metrics", "extractor", "limit", "batch_size", "cache", "out", "device"],
        examples=[
            "tokdyn eval samples test.zip",
            "tokdyn eval samples.npz test.zip metrics=frechet,kid limit=5000 --json",
            "tokdyn eval samples test.zip extractor=cifar10_resnet56.ts cache=test.safetensors",
        ],
    )
    def evaluate(ctx: typer.Context, json: Json = False) -> str:
        """Measure generated images with FID and related metrics.

        Some metrics compare them with REFERENCE; see docs/evaluation.md.
        """
        from tokdyn.evaluate import EvalConfig
        from tokdyn.files import require_path

        config = read(ctx.args, EvalConfig, ["generated", "reference"])
        for path in filter(None, (config.generated, config.reference)):
            require_path(path)
        from tokdyn.evaluate import evaluate

        result = evaluate(config, team_of(ctx))
        following = shell("tokdyn", "bench", "quality", "RUN", config.reference and f"reference={config.reference}")
        if json:
            typer.echo(result.to_json())
            return following
        table(
            ["metric", "value", "spread", "reference"],
            [
                (name, _number(value), _number(result.spread.get(name)), _number(result.reference_values.get(name)))
                for name, value in result.values.items()
            ],
        )
        for line in (*result.warnings, *result.notes):
            typer.echo(line, err=True)
        return following


def _number(value: float | None) -> str:
    """Return a value with four decimals, "-" for None."""
    return "-" if value is None else f"{value:z.4f}"
