"""Open a model and show its playground."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tokdyn.errors import InputError, RecipeError
from tokdyn.playground.server import listen, serve
from tokdyn.playground.settings import PipelinePlaygroundConfig, PlaygroundConfig

if TYPE_CHECKING:
    from tokdyn.bench.stacks import Stack


def require_gradio() -> None:
    """Raise an InputError that says what to install, if gradio is missing."""
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the playground needs gradio, which is not installed: pip install 'tokdyn[playground]'.")


def playground(
    config: PlaygroundConfig | PipelinePlaygroundConfig, stacks: Sequence[str], ready: Callable[[str], None]
) -> None:
    """Serve the playground of a model until the process is interrupted.

    Args:
        config: the settings.
        stacks: stacks to choose from, as `--stack` takes them.
        ready: called with the address of the page, which answers from then on.

    Raises:
        TokdynError: gradio is not installed, the address is taken, or the model or a stack cannot be read.
    """
    require_gradio()
    with listen(config.host, config.port) as listener:
        from tokdyn.bench.stacks import read_stacks
        from tokdyn.playground.classes import ClassStudio
        from tokdyn.playground.page import build
        from tokdyn.playground.prompts import PromptStudio
        from tokdyn.playground.view import STYLE

        choices = [(stack.name, typed(stack)) for stack in read_stacks(stacks)]
        studio = PromptStudio(config) if isinstance(config, PipelinePlaygroundConfig) else ClassStudio(config)
        serve(build(studio, choices), STYLE, listener, ready)


def typed(stack: Stack) -> str:
    """Return the methods of a stack as a user would type them on the page.

    Raises:
        RecipeError: the stack has a model of its own, a tail drop, or both a folder and methods.
    """
    for name, instead in (
        ("model", "the model of the command"),
        ("tail_drop", "a slider"),
        ("uncond_tail_drop", "a slider"),
    ):
        if getattr(stack, name):
            raise RecipeError(
                f"the stack {stack.name} sets {name}, for which the playground has {instead}; leave it out."
            )
    if stack.folder is not None and stack.methods:
        raise RecipeError(f"the stack {stack.name} has both folder and methods; give the playground one of them.")
    if stack.folder is not None:
        return str(stack.folder)
    return stack.methods if isinstance(stack.methods, str) else json.dumps(stack.methods)
