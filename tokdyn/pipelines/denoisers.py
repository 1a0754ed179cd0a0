"""Find the denoisers of a pipeline: the models that it calls once or more in every step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from tokdyn.adapters import declared_adapter
from tokdyn.attach import inner_model
from tokdyn.errors import TokdynError, UnsupportedModelError


def is_pipeline(target: Any) -> bool:
    """Return whether an object is a pipeline: it has components by name, can be called, and is not a model."""
    if isinstance(target, (nn.Module, type)) or not callable(target):
        return False
    return isinstance(getattr(target, "components", None), Mapping)


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """Return the denoisers of a pipeline by the names of their components.

    These are the components called "transformer" or "transformer_" and something more, and others that an adapter
    declares, such as a prior.

    Args:
        pipe: a DiffusionPipeline, a ModularPipeline or another object with `components`.

    Raises:
        UnsupportedModelError: the argument is no pipeline, or has no denoiser that is a transformer.
    """
    if not is_pipeline(pipe):
        raise UnsupportedModelError(f"{type(pipe).__name__} is not a pipeline; give one of diffusers, or a model.")
    models = {name: each for name, each in pipe.components.items() if isinstance(each, nn.Module)}
    found = {name: each for name, each in models.items() if _denoises(name, each)}
    if not found:
        raise UnsupportedModelError(
            f"this {type(pipe).__name__} has no diffusion transformer; its models are {', '.join(models) or 'none'}. "
            "Load a pipeline with one, or load its components first."
        )
    return found


def _denoises(name: str, model: nn.Module) -> bool:
    return name.partition("_")[0] == "transformer" or declared_adapter(inner_model(model)) is not None


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Begin messages of errors within this context with the name of a denoiser; "" leaves them as they are."""
    try:
        yield
    except TokdynError as error:
        if not name:
            raise
        raise type(error)(f"{name}: {error}") from error
