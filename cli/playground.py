"""Define `tokdyn playground`."""

from __future__ import annotations

import typer

from .bench import Stacks
from .frame import command
from .settings import check_model, is_of_pipeline, read


def _settings() -> type:
    from tokdyn.playground.settings import PlaygroundConfig

    return PlaygroundConfig


def _pipeline_settings() -> type:
    from tokdyn.playground.settings import PipelinePlaygroundConfig

    return PipelinePlaygroundConfig


def register(app: typer.Typer) -> None:
    """Add the command."""

    @command(
        app,
        "playground",
        words=["MODEL"],
        settings=_settings,
        main=["model", "steps", "guidance", "tail_drop", "methods", "shown", "device", "host", "port"],
        of_pipelines=_pipeline_settings,
        examples=[
            "tokdyn playground shapes",
            "tokdyn playground runs/demo guidance=2 tail_drop=0.3",
            'tokdyn playground shapes --stack "{name: merged, methods: [{method: merge, ratio: 0.3}]}"',
            "tokdyn playground black-forest-labs/FLUX.1-dev methods=fast precision=bf16 device=cuda",
        ],
    )
    def playground(ctx: typer.Context, stack: Stacks = None) -> None:
        """Draw in a browser, and watch which tokens are computed.

        The page has a field for each setting of a picture. The picture and its token map appear while it is drawn; then
        the picture from the same seed at full cost, with time and FLOPs of both. It is served on this machine alone,
        asks no network for anything, and needs an extra package: pip install 'tokdyn[playground]'.

        A pipeline of diffusers, by folder or hub id, draws prompts, and has settings of its own.
        """
        from tokdyn.playground.run import playground, require_gradio
        from tokdyn.playground.settings import PipelinePlaygroundConfig, PlaygroundConfig

        config: PlaygroundConfig | PipelinePlaygroundConfig
        if is_of_pipeline(ctx.args):
            config = read(ctx.args, PipelinePlaygroundConfig, ["model"])
        else:
            config = read(ctx.args, PlaygroundConfig, ["model"])
            check_model(config.model)
        require_gradio()
        typer.echo(f"Opening {config.model} ...", err=True)
        playground(config, stack or [], lambda address: typer.echo(f"{address}  (Ctrl-C ends it)"))
