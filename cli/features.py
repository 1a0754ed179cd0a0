"""Define `tokdyn features`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from .frame import command
from .output import Json, as_json, pairs
from .settings import read


def _settings() -> type:
    from tokdyn.data import FeaturesConfig

    return FeaturesConfig


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "features",
        words=["PATH"],
        settings=_settings,
        examples=["tokdyn features imagenet/train vae=stabilityai/sd-vae-ft-ema out=latents size=256 --flip"],
    )
    def features(ctx: typer.Context, json: Json = False) -> None:
        """Encode images once, for training on latents."""
        from tokdyn.data import FeaturesConfig, write_features

        report = write_features(read(ctx.args, FeaturesConfig, ["path"]))
        if json:
            as_json(asdict(report))
            return
        pairs(
            [
                ("folder", report.out),
                ("latents", f"{report.count:,} of shape {report.shape}"),
                ("skipped", f"{report.skipped:,} unreadable images"),
                ("files", f"{report.shards}, of which {report.resumed} existed already"),
                ("size", f"{report.size / 2**20:,.1f} MiB"),
            ]
        )
