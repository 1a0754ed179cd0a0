"""From a path to named tensors and settings: single files, sharded files and folders."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tokdyn.checkpoints.pickles import Record, load_pickled
from tokdyn.errors import CheckpointError
from tokdyn.files import json_object

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
METHODS = "tokdyn.safetensors"  # weights of the methods that a model was wrapped with
NOTES = "_tokdyn"
"""Where settings are noted that a foreign layout has no place for: a key of diffusers' config.json, which skips private
ones, and of the header of a safetensors file."""
EMA_NAMES = ("ema", "ema_state_dict", "model_ema")
MODEL_NAMES = ("model", "state_dict", "model_state_dict", "module")


@dataclass(frozen=True)
class Raw:
    """Tensors of a checkpoint under their original names.

    Attributes:
        tensors: by name.
        config: config.json beside the weights, empty if there is none.
        training: the settings object inside a training file.
        notes: settings of the model that `tokdyn convert` wrote into the file, which its layout has no place for.
        origin: what to call the checkpoint in messages.
    """

    tensors: dict[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    training: Record = field(default_factory=Record)
    origin: str = "the state dict"
    notes: Mapping[str, Any] = field(default_factory=dict)


def open_file(path: str | Path, ema: bool = True) -> Raw:
    """Read a checkpoint file or folder without interpreting the names in it.

    Args:
        path: .safetensors, .safetensors.index.json, .pt, .pth, .bin, or a folder with one of them, a diffusers
            pipeline folder (its `transformer`), or a training folder (`ema` and `model` inside).
        ema: take the averaged weights where a checkpoint holds both.

    Returns:
        Tensors and settings.

    Raises:
        CheckpointError: nothing there, several candidates, a damaged file, or a file without a state dict.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give the path of a checkpoint file or folder.")
    if path.is_dir():
        path = _weights_in(path, ema)
    config = json_object(path.parent / "config.json") if (path.parent / "config.json").is_file() else {}
    if path.name.endswith(".index.json"):
        return Raw(_sharded(path), config, origin=str(path))
    if path.suffix == ".safetensors":
        return Raw(_safetensors(path), config, origin=str(path), notes=_notes(path))
    if path.suffix in PICKLED:
        return choose(load_pickled(path), ema, str(path), config)
    raise CheckpointError(f"{path} has an unknown ending; expected .safetensors, .index.json or {', '.join(PICKLED)}.")


def choose(content: Any, ema: bool, origin: str = "the state dict", config: Mapping[str, Any] | None = None) -> Raw:
    """The state dict within the content of a file: the content itself, or the averaged or plain weights in it.

    Args:
        content: a mapping of tensors, or a mapping that holds such mappings under "ema" or "model".
        ema: take the averaged weights where both are there.
        origin: what to call it in messages.
        config: settings found beside it.

    Raises:
        CheckpointError: there is no state dict in it.
    """
    if isinstance(content, Mapping):
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return Raw({str(name): value for name, value in content.items()}, config or {}, origin=origin)
        order = (*EMA_NAMES, *MODEL_NAMES) if ema else (*MODEL_NAMES, *EMA_NAMES)
        for name in order:
            if isinstance(content.get(name), Mapping):
                settings = content.get("config") or content.get("args")
                inner = choose(content[name], ema, f"{origin}[{name!r}]", config)
                return Raw(inner.tensors, inner.config, settings if isinstance(settings, Record) else Record(), origin)
        held = ", ".join(repr(name) for name in list(content)[:6]) or "nothing"
        raise CheckpointError(
            f"{origin} holds {held} and no state dict; expected tensors by name, or such a mapping under "
            f"{', '.join((*EMA_NAMES, *MODEL_NAMES))}."
        )
    raise CheckpointError(f"{origin} holds a {type(content).__name__}; expected a mapping from names to tensors.")


def weight_files(path: str | Path, ema: bool = True) -> list[Path]:
    """The files that `open_file` takes tensors from: one, or the shards that an index names."""
    path = Path(path).expanduser()
    file = _weights_in(path, ema) if path.is_dir() else path
    if not file.name.endswith(".index.json"):
        return [file]
    return [file.parent / name for name in sorted(set(map(str, json_object(file).get("weight_map", {}).values())))]


def _weights_in(folder: Path, ema: bool) -> Path:
    """The one file with weights in a folder."""
    if (folder / "model_index.json").is_file() and (folder / "transformer").is_dir():
        folder = folder / "transformer"
    found = [p for p in sorted(folder.iterdir()) if p.name.endswith(".safetensors.index.json")]
    found = found or [p for p in sorted(folder.iterdir()) if p.suffix == ".safetensors" and p.name != METHODS]
    found = found or [p for p in sorted(folder.iterdir()) if p.suffix in PICKLED]
    inner = [folder / name for name in (("ema", "model") if ema else ("model", "ema")) if (folder / name).is_dir()]
    if inner and not (folder / "config.json").is_file():
        return _weights_in(inner[0], ema)
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{folder} holds {len(found)} files with weights ({', '.join(p.name for p in found[:4])}); name one."
        )
    raise CheckpointError(f"{folder} holds no weights; expected .safetensors, .safetensors.index.json or a .pt file.")


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file ({error}).") from error
    return tensors


def _notes(path: Path) -> dict[str, Any]:
    """The settings in the header of a file, empty if there are none."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(NOTES, "{}")
    try:
        notes = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{path} has a header whose {NOTES} is no JSON ({error}).") from error
    if not isinstance(notes, dict):
        raise CheckpointError(f"{path} has a header whose {NOTES} is a {type(notes).__name__}, expected an object.")
    return notes


def _sharded(index: Path) -> dict[str, Tensor]:
    """All tensors of a sharded checkpoint; every shard lies beside its index."""
    places = json_object(index).get("weight_map")
    if not isinstance(places, Mapping) or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index} has no weight_map from tensor names to shards.")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        shard = index.parent / name
        if Path(name).name != name or not shard.is_file():
            raise CheckpointError(f"{index} names the shard {name!r}, which does not lie beside it.")
        tensors |= _safetensors(shard)
    missing = sorted(set(places) - set(tensors))
    if missing:
        raise CheckpointError(f"the shards of {index} lack {len(missing)} tensors, {missing[0]!r} the first of them.")
    return tensors
