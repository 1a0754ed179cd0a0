"""Define `tokdyn convert`."""

from __future__ import annotations

from dataclasses import asdict

import typer

from .frame import command
from .output import Json, as_json, pairs
from .settings import read


def _settings() -> type:
    from tokdyn.bases.converting import ConvertConfig

    return ConvertConfig


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "convert",
        words=["SOURCE", "DESTINATION"],
        settings=_settings,
        examples=[
            "tokdyn convert DiT-XL-2-256x256.pt dit-xl --to diffusers",
            "tokdyn convert SiT-XL/2 sit-xl --to tokdyn --dtype bf16",
            "tokdyn convert runs/demo/model dcdit.safetensors --to official",
            "tokdyn convert facebook/DiT-XL-2-256 dit.safetensors --to facebook timestep_shift=0 mlp_norm_eps=1e-6",
        ],
    )
    def convert(ctx: typer.Context, json: Json = False) -> None:
        """Convert a checkpoint to another project's layout."""
        from tokdyn.bases.converting import ConvertConfig
        from tokdyn.bases.converting import convert as run

        done = run(read(ctx.args, ConvertConfig, ["source", "destination"]))
        if json:
            as_json(asdict(done))
            return
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
