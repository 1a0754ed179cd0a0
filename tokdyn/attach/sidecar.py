"""Save and load the methods of a wrapped model: two small files, beside its weights or anywhere else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from tokdyn import __version__
from tokdyn.attach.containers import inner_model
from tokdyn.attach.entry import attached, unwrap, wrap
from tokdyn.attach.offload import weights_are_offloaded
from tokdyn.errors import CheckpointError, InputError
from tokdyn.files import json_object, replacing
from tokdyn.methods import Method
from tokdyn.methods.registry import from_settings, to_settings

CONFIG, WEIGHTS = "tokdyn_config.json", "tokdyn.safetensors"
Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write the methods of a wrapped model and their trained parts; the model itself is not written.

    Args:
        model: a wrapped model.
        folder: made if need be.

    Returns:
        The folder.

    Raises:
        InputError: the model is not wrapped, or the weights of the methods are offloaded.
        OutputError: the folder cannot be written to.
    """
    from safetensors.torch import save_file

    attachment, where = attached(model), Path(folder).expanduser()
    model = inner_model(model)
    if weights_are_offloaded(model, attachment):
        raise InputError("the weights of the methods are offloaded; save them before offloading the model.")
    methods = [to_settings(each) for each in attachment.methods]
    content = {"tokdyn": __version__, "model": type(model).__name__, "methods": methods}
    weights = {name: value.detach().contiguous() for name, value in attachment.state_dict().items()}
    if weights:
        with replacing(where / WEIGHTS) as half:
            save_file(weights, half)
    with replacing(where / CONFIG) as half:
        half.write_text(json.dumps(content, indent=1) + "\n")
    return where


def load(model: Model, folder: str | Path) -> Model:
    """Wrap a model with the methods that `save` wrote.

    Args:
        model: not wrapped; of the class that the methods were saved from.
        folder: from `save`.

    Returns:
        The same object, wrapped.

    Raises:
        CheckpointError: files are missing, damaged, of another class or of methods that this version does not know.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = Path(folder).expanduser()
    content = json_object(where / CONFIG)
    if content.get("model") != type(model).__name__:
        raise CheckpointError(
            f"{where / CONFIG} holds methods for a {content.get('model')}, but this is a {type(model).__name__}."
        )
    wrap(model, [_method(each, where / CONFIG) for each in content.get("methods", [])])
    expected = set(attached(model).state_dict())
    try:
        weights = load_file(where / WEIGHTS) if expected else {}
        attached(model).load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        unwrap(model)
        raise CheckpointError(f"{where / WEIGHTS} does not fit the methods beside it ({error}).") from error
    return model


def _method(settings: Any, path: Path) -> Method:
    """Make a method from what a file holds of it."""
    try:
        return from_settings(settings)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
