"""Define `tokdyn features`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from .frame import command, team_of
from .output import Json, as_json, pairs, shell
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
        together=True,
        settings=_settings,
        main=["path", "vae", "out", "size", "flip", "num_classes", "on_error", "dtype", "batch_size", "device"],
        examples=["tokdyn features imagenet/train vae=stabilityai/sd-vae-ft-ema out=latents size=256 --flip"],
    )
    def features(ctx: typer.Context, json: Json = False) -> str:
        """Encode images once, for training on latents."""
        from tokdyn.data import FeaturesConfig
        from tokdyn.data.remote.addresses import has_braces, is_address
        from tokdyn.files import require_path, user_path

        config = read(ctx.args, FeaturesConfig, ["path"])
        if config.path is not None and not is_address(config.path) and not has_braces(config.path):
            require_path(user_path(config.path))
        from tokdyn.data import write_features

        report = write_features(config, team=team_of(ctx))
        sizes = [f"data.path={report.out}", f"data.size={report.shape[1]}x{report.shape[2]}", "data.num_classes=null"]
        following = shell("tokdyn", "train", "imagenet/dc-dit-s-256", *sizes, "--dry-run")
        if json:
            as_json(asdict(report))
            return following
        pairs(
            [
                ("folder", report.out),
                ("latents", f"{report.count:,} of shape {report.shape}"),
                ("skipped", f"{report.skipped:,} unreadable images"),
                ("files", f"{report.shards}, of which {report.resumed} existed already"),
                ("size", f"{report.size / 2**20:,.1f} MiB"),
            ]
        )
        return following
