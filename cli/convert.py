"""Define `tokdyn convert`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from .frame import command
from .output import Json, as_json, pairs, shell
from .settings import check_model, read


def _settings() -> type:
    from tokdyn.bases.convert_config import ConvertConfig

    return ConvertConfig


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "convert",
        words=["SOURCE", "DESTINATION"],
        settings=_settings,
        main=["source", "destination", "to", "kind", "dtype", "ema", "num_heads", "sample_size"],
        examples=[
            "tokdyn convert DiT-XL-2-256x256.pt dit-xl --to diffusers",
            "tokdyn convert SiT-XL/2 sit-xl --to tokdyn --dtype bf16",
            "tokdyn convert runs/demo/model dcdit.safetensors --to official",
            "tokdyn convert facebook/DiT-XL-2-256 dit.safetensors --to facebook timestep_shift=0 mlp_norm_eps=1e-6",
        ],
    )
    def convert(ctx: typer.Context, json: Json = False) -> str:
        """Convert a checkpoint to another project's layout."""
        from tokdyn.bases.convert_config import ConvertConfig

        config = read(ctx.args, ConvertConfig, ["source", "destination"])
        check_model(config.source)
        from tokdyn.bases.converting import convert as run

        done = run(config)
        following = shell("tokdyn", "sample", done.place, "steps=25")
        if json:
            as_json(asdict(done))
            return following
        methods = f", with {' and '.join(done.methods)} attached" if done.methods else ""
        pairs(
            [
                ("model", f"{done.model}, {done.parameters:,} parameters, {done.objective} objective{methods}"),
                ("from", f"{done.source} (sha256 {done.sha256})"),
                *(("written", file) for file in done.files),
            ]
        )
        for note in done.notes:
            typer.echo(f"Note: {note}", err=True)
        return following
