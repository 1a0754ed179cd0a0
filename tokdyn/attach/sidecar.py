"""Save and load the methods of a wrapped model.

They are one safetensors file with their settings in its metadata, or two files in a folder of their own or beside the
model's weights: `tokdyn_config.json` with the settings, and `tokdyn.safetensors` with the trained parts, if there are
any. LoRA that was trained with the methods is one of these parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from tokdyn import __version__
from tokdyn.adapters.clock import Level, told_level
from tokdyn.attach.attachment import Attachment
from tokdyn.attach.containers import inner_model
from tokdyn.attach.entry import attached, unwrap, wrap
from tokdyn.attach.offload import weights_are_offloaded
from tokdyn.errors import CheckpointError, InputError
from tokdyn.files import json_object, replacing, user_path
from tokdyn.lora import add_lora, layers_of, load_lora, lora_rank, lora_tensors, require_peft
from tokdyn.methods import Method
from tokdyn.methods.registry import from_settings, to_settings
from tokdyn.reading import one_line, shown

CONFIG = "tokdyn_config.json"  # two assignments: the API reference resolves no names in a tuple
WEIGHTS = "tokdyn.safetensors"
_ONE_FILE = ".safetensors"
_KEYS = frozenset({"tokdyn", "model", "methods", "level", "lora"})
_FUNCTION = "function"  # in place of a noise level that is computed by a function, which no file can hold
Model = TypeVar("Model", bound=nn.Module)


def is_one_file(place: str | Path) -> bool:
    """Return whether `save` writes one file to this place, by its ending, and no folder."""
    return Path(place).suffix == _ONE_FILE


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parts of the methods of a wrapped model, and its LoRA, by the names that `save` writes."""
    return {**attached(model).state_dict(), **lora_tensors(inner_model(model))}


def load_trained_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load what `trained_tensors` returned into a model that is wrapped with the same methods, and has the same LoRA.

    Raises:
        RuntimeError: a tensor is missing, is left over or has another shape.
    """
    own = {name: value for name, value in tensors.items() if not layers_of([name])}
    attached(model).load_state_dict(own)
    load_lora(inner_model(model), tensors)


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write the methods of a wrapped model and their trained parts, without the model's own weights.

    A noise level that was given to `wrap` as a function is not written, and `load` asks for it again.

    Args:
        model: a wrapped model, or a container such as DistributedDataParallel around one.
        folder: created if it does not exist; files of an earlier call are replaced. A name that ends in .safetensors
            makes one file.

    Returns:
        The folder, or the file.

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
    content = _content(model, attachment)
    weights = {name: value.detach().contiguous() for name, value in trained_tensors(model).items()}
    if is_one_file(where):
        with replacing(where) as temporary:
            save_file(weights, temporary, {"tokdyn": json.dumps(content)})
        return where
    if weights:
        with replacing(where / WEIGHTS) as temporary:
            save_file(weights, temporary)
    with replacing(where / CONFIG) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
    return where


def _content(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    """Return the settings of the methods, as they are written."""
    methods = [to_settings(method) for method in attachment.methods]
    content: dict[str, Any] = {"tokdyn": __version__, "model": type(model).__name__, "methods": methods}
    if (rank := lora_rank(model)) is not None:
        content["lora"] = {"rank": rank}
    if (level := told_level(attachment.adapter)) is not None:
        content["level"] = _FUNCTION if callable(level) else level
    return content


def load(model: Model, folder: str | Path, level: Level | None = None) -> Model:
    """Wrap a model, in place, with the methods that `save` wrote.

    Args:
        model: a model that is not wrapped, of the class that the methods were saved from.
        folder: the folder, or the file, that `save` returned.
        level: as in `wrap`, in place of the one that was saved; needed if that is a function.

    Returns:
        The same object, wrapped.

    Raises:
        CheckpointError: a file is missing or damaged, was written for another model class or other sizes, names a
            method that is not registered here, or needs a level.
        CompositionError, UnsupportedModelError, InputError: as in `wrap`, or there is LoRA and peft is not installed.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = user_path(folder)
    content, source = read_settings(where)
    if content.get("model") != type(model).__name__:
        raise CheckpointError(
            f"{source} holds methods for a {content.get('model')}, but this is a {type(model).__name__}; give "
            "another folder or a model of that class."
        )
    level = content.get("level") if level is None else level
    if level == _FUNCTION:
        raise CheckpointError(
            f"{source} was saved with a noise level that a function computes, which no file can hold; give it "
            "again, as in tokdyn.load(model, folder, level=function)."
        )
    methods = [_method(settings, source) for settings in content.get("methods", [])]
    if (rank := _rank(content.get("lora"), source)) is not None:
        require_peft()
    wrap(model, methods, level)
    weights_in = source if is_one_file(source) else where / WEIGHTS
    try:
        expects = bool(attached(model).state_dict()) or rank is not None
        weights = load_file(weights_in) if expects else {}
        if rank is not None:
            _check_ranks(weights, rank)
            add_lora(model, layers_of(weights), rank, training=False)
        load_trained_tensors(model, weights)
    except (OSError, SafetensorError, RuntimeError, ValueError, KeyError, InputError) as error:
        unwrap(model)
        raise CheckpointError(
            f"{weights_in} does not hold the weights of the methods in {source.name} ({one_line(error)}); save them "
            "again."
        ) from error
    attached(model).watch.first.settle()
    return model


def read_settings(where: Path) -> tuple[dict[str, Any], Path]:
    """Read the settings that `save` wrote, and return them with the file that holds them.

    Raises:
        CheckpointError: there is no such file, or it is damaged or holds something else.
    """
    if not is_one_file(where):
        if not (where / CONFIG).is_file():
            what = f"holds no {CONFIG}" if where.is_dir() else "is no folder"
            raise CheckpointError(f"{where} {what}; give a folder that tokdyn.save or tokdyn calibrate has written.")
        return _known(json_object(where / CONFIG), where / CONFIG), where / CONFIG
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(where, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{where} cannot be read ({error}); give a file that tokdyn.save has written.") from error
    try:
        content = json.loads(metadata["tokdyn"])
    except (KeyError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} holds no settings of methods; give a file that tokdyn.save has written.")
    return _known(content, where), where


def _known(content: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return settings as they are; raise a CheckpointError if this version did not write them."""
    methods, unknown = content.get("methods", []), sorted(set(content) - _KEYS)
    if unknown or not isinstance(methods, list):
        what = f"has {shown(unknown[0])}" if unknown else f"lists {shown(methods)} as its methods"
        raise CheckpointError(
            f"{source} {what}, which this version of tokdyn does not know; use the version that wrote it, or save the "
            "methods again."
        )
    return content


def _rank(lora: Any, source: Path) -> int | None:
    """Return the rank in the settings of LoRA; None if there are none."""
    if lora is None:
        return None
    rank = lora.get("rank") if isinstance(lora, dict) else None
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise CheckpointError(f"{source}: the rank of the LoRA is {rank!r}, expected a positive number; save it again.")
    return rank


def _check_ranks(weights: Mapping[str, Tensor], rank: int) -> None:
    """Check the rank before memory is allocated for it.

    Raises:
        RuntimeError: a matrix has another one.
    """
    for layer in layers_of(weights):
        for name, axis in ((f"lora.{layer}.A", 0), (f"lora.{layer}.B", -1)):
            if name not in weights or weights[name].dim() != 2 or weights[name].shape[axis] != rank:
                raise RuntimeError(f"there is no matrix {name} of rank {rank}")


def _method(settings: Any, path: Path) -> Method:
    """Make a method from its settings in the file at `path`, which is named if they are wrong."""
    try:
        return from_settings(settings)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
