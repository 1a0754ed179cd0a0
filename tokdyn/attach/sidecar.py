"""Save and load the methods of a wrapped model.

They are two files in a folder of their own or beside the model's weights: `tokdyn_config.json` with the settings, and
`tokdyn.safetensors` with the trained parts, if there are any.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from tokdyn import __version__
from tokdyn.adapters.clock import Level, told_level
from tokdyn.attach.containers import inner_model
from tokdyn.attach.entry import attached, unwrap, wrap
from tokdyn.attach.offload import weights_are_offloaded
from tokdyn.errors import CheckpointError, InputError
from tokdyn.files import json_object, replacing, user_path
from tokdyn.methods import Method
from tokdyn.methods.registry import from_settings, to_settings
from tokdyn.reading import one_line, shown

CONFIG = "tokdyn_config.json"  # two assignments: the API reference resolves no names in a tuple
WEIGHTS = "tokdyn.safetensors"
_KEYS = frozenset({"tokdyn", "model", "methods", "level"})
_FUNCTION = "function"  # in place of a noise level that is computed by a function, which no file can hold
Model = TypeVar("Model", bound=nn.Module)


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write the methods of a wrapped model and their trained parts, without the model's own weights.

    A noise level that was given to `wrap` as a function is not written, and `load` asks for it again.

    Args:
        model: a wrapped model, or a container such as DistributedDataParallel around one.
        folder: created if it does not exist; files of an earlier call are replaced.

    Returns:
        The folder.

    Raises:
        InputError: the model is not wrapped, or the weights of the methods are offloaded.
        OutputError: the folder cannot be written to.
    """
    from safetensors.torch import save_file

    attachment, where = attached(model), user_path(folder)
    model = inner_model(model)
    if weights_are_offloaded(model, attachment):
        raise InputError(
            "the weights of the methods are offloaded; call tokdyn.save before offload is enabled on the model."
        )
    methods = [to_settings(method) for method in attachment.methods]
    content: dict[str, Any] = {"tokdyn": __version__, "model": type(model).__name__, "methods": methods}
    if (level := told_level(attachment.adapter)) is not None:
        content["level"] = _FUNCTION if callable(level) else level
    weights = {name: value.detach().contiguous() for name, value in attachment.state_dict().items()}
    if weights:
        with replacing(where / WEIGHTS) as temporary:
            save_file(weights, temporary)
    with replacing(where / CONFIG) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return where


def load(model: Model, folder: str | Path, level: Level | None = None) -> Model:
    """Wrap a model, in place, with the methods that `save` wrote.

    Args:
        model: a model that is not wrapped, of the class that the methods were saved from.
        folder: the folder that `save` returned.
        level: as in `wrap`, in place of the one that was saved; needed if that is a function.

    Returns:
        The same object, wrapped.

    Raises:
        CheckpointError: a file is missing or damaged, was written for another model class or other sizes, names a
            method that is not registered here, or needs a level.
        CompositionError, UnsupportedModelError, InputError: as in `wrap`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = user_path(folder)
    if not (where / CONFIG).is_file():
        what = f"holds no {CONFIG}" if where.is_dir() else "is no folder"
        raise CheckpointError(f"{where} {what}; give a folder that tokdyn.save or tokdyn calibrate has written.")
    content = json_object(where / CONFIG)
    methods, unknown = content.get("methods", []), sorted(set(content) - _KEYS)
    if unknown or not isinstance(methods, list):
        what = f"has {shown(unknown[0])}" if unknown else f"lists {shown(methods)} as its methods"
        raise CheckpointError(
            f"{where / CONFIG} {what}, which this version of tokdyn does not know; use the version that wrote it, "
            "or save the "
            "methods again."
        )
    if content.get("model") != type(model).__name__:
        raise CheckpointError(
            f"{where / CONFIG} holds methods for a {content.get('model')}, but this is a {type(model).__name__}; give "
            "another folder or a model of that class."
        )
    level = content.get("level") if level is None else level
    if level == _FUNCTION:
        raise CheckpointError(
            f"{where / CONFIG} was saved with a noise level that a function computes, which no file can hold; give it "
            "again, as in tokdyn.load(model, folder, level=function)."
        )
    wrap(model, [_method(settings, where / CONFIG) for settings in methods], level)
    expected = set(attached(model).state_dict())
    try:
        weights = load_file(where / WEIGHTS) if expected else {}
        attached(model).load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError) as error:
        unwrap(model)
        raise CheckpointError(
            f"{where / WEIGHTS} does not hold the weights of the methods in {CONFIG} ({one_line(error)}); save "
            "them again."
        ) from error
    attached(model).watch.first.settle()
    return model


def _method(settings: Any, path: Path) -> Method:
    """Make a method from its settings in the file at `path`, which is named if they are wrong."""
    try:
        return from_settings(settings)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
