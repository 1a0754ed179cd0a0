"""Save and restore everything that training changes: weights, averaged weights, optimizer state, sums of metrics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokdyn.attach import attachment_of, base_class, load, save
from tokdyn.checkpoints.optimizer import load_optimizer, optimizer_tensors
from tokdyn.errors import CheckpointError
from tokdyn.train.ema import Ema
from tokdyn.train.window import Window

METHODS = "methods"
"""Name of the folder beside a model's weights that holds the methods attached to it."""
_OPTIMIZER = "optimizer/"
_WINDOW = "window/"
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL"}


@dataclass
class Trainee:
    """Everything that training changes.

    Attributes:
        model: The network, without its data-parallel wrapper.
        ema: The model's averaged weights.
        optimizer: torch's AdamW over the trainable parameters.
        window: Sums of metrics since the last log line.
        info: Contents of the tokdyn.json that is saved beside the weights: objective, data, class names.
    """

    model: Any
    ema: Ema
    optimizer: torch.optim.Optimizer
    window: Window
    info: dict[str, Any]

    def save(self, folder: Path) -> None:
        """Write model/, ema/ and state.safetensors into a folder."""
        save_model(self.model, folder / "model", self.info)
        save_model(self.ema.model, folder / "ema", self.info)
        tensors = {_OPTIMIZER + key: value for key, value in optimizer_tensors(self.model, self.optimizer).items()}
        tensors |= {_WINDOW + key: value for key, value in self.window.tensors().items()}
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, folder / "state.safetensors"
        )

    def restore(self, folder: Path) -> None:
        """Restore in place what `save` wrote into a folder.

        Raises:
            CheckpointError: The checkpoint cannot be read, or does not belong to this model.
        """
        load_weights(self.model, folder / "model")
        load_weights(self.ema.model, folder / "ema")
        try:
            tensors = load_file(folder / "state.safetensors")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / 'state.safetensors'} cannot be read: {error}.") from error
        load_optimizer(self.model, self.optimizer, _with_prefix(tensors, _OPTIMIZER))
        self.window.load(_with_prefix(tensors, _WINDOW))


def save_model(model: Any, folder: Path, info: dict[str, Any]) -> None:
    """Write a diffusers model into a folder, with the methods attached to it, and `info` as tokdyn.json."""
    model.save_pretrained(folder)
    if attachment_of(model) is not None:
        save(model, folder / METHODS)
    (folder / "tokdyn.json").write_text(json.dumps(info, indent=1), encoding="utf-8")


def load_weights(model: Any, folder: Path) -> None:
    """Copy the weights that `save_model` wrote to a folder into an existing model, in place.

    Raises:
        CheckpointError: The weights cannot be read, or their names, shapes or types are not those of the model.
    """
    try:
        saved = base_class(model).from_pretrained(folder)  # type: ignore[attr-defined]
        _check_stored(folder, saved.state_dict())
        if attachment_of(model) is not None:
            load(saved, folder / METHODS)
        model.load_state_dict(saved.state_dict())
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"The weights in {folder} do not belong to this recipe's model: {error}") from error


def _check_stored(folder: Path, expected: dict[str, Tensor]) -> None:
    """Compare names and types of stored weights with those of the model that diffusers has built of them.

    diffusers compares the shapes, but leaves at random what is missing, and converts other types.

    Raises:
        ValueError: They differ.
    """
    stored: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    wrong = sorted(stored.keys() ^ expected.keys())
    wrong += [name for name in expected if stored.get(name) != _TYPES.get(expected[name].dtype) and name not in wrong]
    if wrong:
        raise ValueError(f"{wrong[0]} is missing, unknown or of another type.")


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names start with a prefix, under their names without the prefix."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
