"""Read the tensors of a checkpoint by name, and the settings stored with them, from a file, shards or a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tokdyn.checkpoints import shards
from tokdyn.checkpoints.eight_bits import from_eight_bits
from tokdyn.checkpoints.formats import PICKLED
from tokdyn.checkpoints.pickles import Record, load_pickled, require_honest
from tokdyn.errors import CheckpointError
from tokdyn.files import json_object, user_path
from tokdyn.limits import TENSORS
from tokdyn.reading import RefusedFileError, one_line, open_regular, parse_json, shown

_NESTED = 8  # mappings within each other that may hold a state dict; some hold themselves
METHODS = "tokdyn.safetensors"  # weights of attached methods, which are not those of a model
NOTES = "_tokdyn"
"""Key under which tokdyn stores the settings that the layout of another project has no key for: in diffusers'
config.json, of which diffusers ignores names with a leading underscore, and in the header of a safetensors file."""
EMA_NAMES = ("ema", "ema_state_dict", "model_ema")
MODEL_NAMES = ("model", "state_dict", "model_state_dict", "module")


@dataclass(frozen=True)
class Raw:
    """The tensors of a checkpoint under their original names, with the settings stored beside them.

    Attributes:
        tensors: tensors by name.
        config: contents of the config.json beside the weights; empty if there is none.
        training: the settings object in a training file of the original project; without attributes if there is none.
        notes: settings that `tokdyn convert` stored under the key `NOTES`.
        origin: name of the checkpoint, for error messages.
    """

    tensors: dict[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    training: Record = field(default_factory=Record)
    origin: str = "the state dict"
    notes: Mapping[str, Any] = field(default_factory=dict)


def open_file(path: str | Path, ema: bool = True) -> Raw:
    """Read a checkpoint file or folder, without recognising its format.

    Args:
        path: a .safetensors, .safetensors.index.json, .pt, .pth, .bin or .ckpt file; a folder that holds one of them,
            or shards that several processes wrote; a folder of a diffusers pipeline, of which `transformer` is read; or
            a folder with `ema` and `model` inside.
        ema: take the averaged weights if a checkpoint holds averaged and plain ones.

    Raises:
        CheckpointError: the path does not exist, a folder holds several files with weights, or the file is damaged or
            does not hold a state dict.
    """
    path = user_path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the path of a checkpoint file or folder.")
    if path.is_dir():
        path = _weights_in(path, ema)
    for file in sorted(path.glob(shards.NAMES)) if path.is_dir() else [path]:
        _require_regular(file)
    config_file = (path if path.is_dir() else path.parent) / "config.json"
    config = json_object(config_file) if config_file.is_file() else {}
    if path.is_dir():
        tensors = shards.whole(path)
        _require_plain(tensors, str(path))
        return Raw(tensors, config, origin=str(path))
    if path.name.endswith(".index.json"):
        return Raw(_sharded(path), config, origin=str(path))
    if path.suffix == ".safetensors":
        return Raw(_safetensors(path), config, origin=str(path), notes=_notes(path))
    if path.suffix in PICKLED:
        raw = find_state_dict(load_pickled(path), ema, str(path), config)
        try:
            require_honest(path, sum(tensor.numel() * tensor.element_size() for tensor in raw.tensors.values()))
        except RefusedFileError as error:
            raise CheckpointError(f"{path} is not read, because its tensors repeat their elements: {error}.") from error
        return raw
    raise CheckpointError(f"{path} has an unknown ending; expected .safetensors, .index.json or {', '.join(PICKLED)}.")


def find_state_dict(
    content: Any, ema: bool, origin: str = "the state dict", config: Mapping[str, Any] | None = None, depth: int = 0
) -> Raw:
    """Find the state dict in the content of a file.

    Args:
        content: a mapping from names to tensors, or a mapping that holds such mappings under names such as "ema" and
            "model".
        ema: take the averaged weights if the content holds averaged and plain ones.
        origin: name of the checkpoint, for error messages.
        config: contents of the config.json beside the file.
        depth: number of mappings that the content lies in.

    Raises:
        CheckpointError: the content does not hold a state dict.
    """
    if isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            tensors = {str(name): value for name, value in content.items()}
            _require_plain(tensors, origin)
            return Raw(tensors, config or {}, origin=origin)
        order = (*EMA_NAMES, *MODEL_NAMES) if ema else (*MODEL_NAMES, *EMA_NAMES)
        for name in order:
            if isinstance(content.get(name), Mapping) and depth < _NESTED:
                settings = next(
                    (each for key in ("config", "args") if isinstance(each := content.get(key), Record)), Record()
                )
                inner = find_state_dict(content[name], ema, f"{origin}[{name!r}]", config, depth + 1)
                return Raw(inner.tensors, inner.config, settings, origin)
        names = ", ".join(shown(name) for name in list(content)[:6]) or "nothing"
        raise CheckpointError(
            f"{origin} holds {names} but no state dict; expected tensors by name, or such a mapping under one of "
            f"{', '.join((*EMA_NAMES, *MODEL_NAMES))}."
        )
    raise CheckpointError(f"{origin} holds a {type(content).__name__}; expected a mapping from names to tensors.")


def weight_files(path: str | Path, ema: bool = True) -> list[Path]:
    """List the files that `open_file` reads tensors from, with the same arguments: one file, or the shards."""
    path = user_path(path)
    file = _weights_in(path, ema) if path.is_dir() else path
    if file.is_dir():
        return sorted(file.glob(shards.NAMES))
    if not file.name.endswith(".index.json"):
        return [file]
    return _shards(file)


def _weights_in(folder: Path, ema: bool) -> Path:
    """Return the path of the one file with the weights in a folder, or that of the folder if it holds shards.

    Raises:
        CheckpointError: There is no such file, or more than one.
    """
    if (folder / "model_index.json").is_file() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    found = [p for p in sorted(folder.iterdir()) if p.name.endswith(".safetensors.index.json")]
    found = found or [p for p in sorted(folder.iterdir()) if p.suffix == ".safetensors" and p.name != METHODS]
    found = found or [p for p in sorted(folder.iterdir()) if p.suffix in PICKLED]
    inner = [folder / name for name in (("ema", "model") if ema else ("model", "ema")) if (folder / name).is_dir()]
    if inner and not (folder / "config.json").is_file():
        return _weights_in(inner[0], ema)
    if found and all(path.match(shards.NAMES) for path in found):
        return folder
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(path.name for path in found[:4])
        raise CheckpointError(f"{folder} holds {len(found)} files with weights ({names}); give the path of one.")
    raise CheckpointError(f"{folder} holds no weights; expected .safetensors, .safetensors.index.json or a .pt file.")


def _safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raise a CheckpointError if it cannot be read."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except Exception as error:  # a damaged or hostile header can raise anything
        raise CheckpointError(
            f"{path} is truncated or not a safetensors file ({one_line(error)}); copy or download it again, or "
            "use another checkpoint."
        ) from error
    _require_plain(tensors, str(path))
    return from_eight_bits(tensors, str(path))


def _require_regular(path: Path) -> None:
    """Raise a CheckpointError if a path leads to a named pipe or a device, of which reading might never end."""
    try:
        open_regular(path).close()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error


def _require_plain(tensors: Mapping[str, Tensor], origin: str) -> None:
    """Raise a CheckpointError if there are too many tensors, or one that holds no ordinary real numbers."""
    if excess := TENSORS.excess(len(tensors)):
        raise CheckpointError(f"{origin} has {excess}.")
    for name, tensor in tensors.items():
        if (
            tensor.layout != torch.strided
            or tensor.is_complex()
            or tensor.is_quantized
            or tensor.is_meta
            or tensor.is_nested
        ):
            raise CheckpointError(
                f"{origin} holds {one_line(name, 80)} as {tensor.dtype} in the layout {tensor.layout} on "
                f"{tensor.device}; "
                "save it as an ordinary tensor of real numbers."
            )


def _notes(path: Path) -> dict[str, Any]:
    """Read the settings under the key `NOTES` in the header of a safetensors file; {} if there are none."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(NOTES, "{}")
    try:
        notes = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"the header of {path} has a {NOTES} that is not JSON ({one_line(error)}).") from error
    if not isinstance(notes, dict):
        raise CheckpointError(f"the header of {path} has a {type(notes).__name__} under {NOTES}, expected an object.")
    return notes


def _shards(index: Path) -> list[Path]:
    """List the paths of the shards that an index names.

    All shards must lie beside the index, so that an index from a download cannot make other files be read. A shard may
    be a link, as in the cache of the hub.

    Raises:
        CheckpointError: the index is malformed, or names a shard that does not lie beside it.
    """
    paths = []
    for name in sorted(set(_weight_map(index).values())):
        if Path(name).name != name or not (index.parent / name).is_file():
            raise CheckpointError(f"{index} names the shard {name!r}, which is not in its folder; put it there.")
        paths.append(index.parent / name)
    return paths


def _weight_map(index: Path) -> Mapping[str, str]:
    """Read an index: the name of the shard for each tensor name."""
    weight_map = json_object(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to shards.")
    return weight_map


def _sharded(index: Path) -> dict[str, Tensor]:
    """Read all tensors of a sharded checkpoint."""
    tensors: dict[str, Tensor] = {}
    for shard in _shards(index):
        tensors |= _safetensors(shard)
    missing = sorted(set(_weight_map(index)) - set(tensors))
    if missing:
        raise CheckpointError(f"the shards of {index} lack {len(missing)} of its tensors, the first is {missing[0]!r}.")
    return tensors
