"""Save and restore everything that training changes: weights, averaged weights, optimizer state, sums of metrics.

A checkpoint is sharded if the weights are when it is written, and either kind is restored into either kind of weights.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from tokdyn.attach import attachment_of, base_class, load, save
from tokdyn.checkpoints import shards
from tokdyn.checkpoints.optimizer import load_optimizer, optimizer_tensors
from tokdyn.errors import CheckpointError
from tokdyn.train.ema import Ema
from tokdyn.train.sharding import gathered
from tokdyn.train.window import Window

METHODS = "methods"
"""Name of the folder beside a model's weights that holds the methods attached to it."""
_OPTIMIZER = "optimizer/"
_WINDOW = "window/"
_PARTS = ("model", "ema", "optimizer")  # folders of a sharded checkpoint
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
        skeleton: A copy of the model without values, if its weights are sharded; None if every process has all of them.
    """

    model: Any
    ema: Ema
    optimizer: torch.optim.Optimizer
    window: Window
    info: dict[str, Any]
    skeleton: Any = None

    def average(self, keep: bool) -> Any:
        """Return the averaged model, whole. If the weights are sharded, every process calls it.

        Args:
            keep: Whether this process needs the result; if not, and the weights are sharded, it is None.
        """
        return self.ema.model if self.skeleton is None else gathered(self.ema.model, self.skeleton, keep)

    def save(self, folder: Path, main: bool = True) -> None:
        """Write model/, ema/ and state.safetensors into a folder, and optimizer/ if the weights are sharded.

        Args:
            folder: The folder, which the main process has made. If the weights are sharded, every process calls this
                method, with the same folder.
            main: Whether this is the main process, which writes all that is not sharded.
        """
        tensors = {_OPTIMIZER + key: value for key, value in optimizer_tensors(self.model, self.optimizer).items()}
        if self.skeleton is None:
            save_model(self.model, folder / "model", self.info)
            save_model(self.ema.model, folder / "ema", self.info)
        else:
            tensors = self._save_shards(folder, tensors, main)
        tensors |= {_WINDOW + key: value for key, value in self.window.tensors().items()}
        if main:
            save_file(
                {key: value.detach().cpu().contiguous() for key, value in tensors.items()}, folder / "state.safetensors"
            )

    def _save_shards(self, folder: Path, tensors: dict[str, Tensor], main: bool) -> dict[str, Tensor]:
        """Write what is sharded of the weights and of `tensors`, the optimizer's; return what is not."""
        tensors = {**self._weights(), **tensors}
        for part in _PARTS if main else ():
            (folder / part).mkdir()
            if part != "optimizer":
                self.skeleton.save_config(folder / part)
                _write_info(folder / part, self.info)
        torch.distributed.barrier()
        for part in _PARTS:
            prefix = f"{part}/"
            sharded = {key: each for key, each in _with_prefix(tensors, prefix).items() if isinstance(each, DTensor)}
            shards.write(folder / part, sharded)
            if main and shards.shapes(sharded) != shards.stored(folder / part):
                raise CheckpointError(
                    f"Shards of other processes are not in {folder / part}; choose an out=FOLDER that all of them see, "
                    "on a disk that their machines share."
                )
        return {key: each for key, each in tensors.items() if not isinstance(each, DTensor)}

    def restore(self, folder: Path) -> None:
        """Restore in place what `save` wrote into a folder.

        Raises:
            CheckpointError: The checkpoint cannot be read, or does not belong to this model.
        """
        try:
            tensors = load_file(folder / "state.safetensors")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / 'state.safetensors'} cannot be read: {error}.") from error
        if any((folder / "model").glob(shards.NAMES)):
            moments = self._restore_shards(folder, tensors)
        else:
            self._restore_whole(folder)
            moments = _with_prefix(tensors, _OPTIMIZER)
        load_optimizer(self.model, self.optimizer, self._placed(moments))
        self.window.load(_with_prefix(tensors, _WINDOW))

    def _restore_whole(self, folder: Path) -> None:
        """Restore weights that were saved whole."""
        for part, model in (("model", self.model), ("ema", self.ema.model)):
            if self.skeleton is None:
                load_weights(model, folder / part)
                continue
            whole = copy.deepcopy(self.skeleton).to_empty(device="cpu")
            load_weights(whole, folder / part)
            values, targets = whole.state_dict(), model.state_dict()
            for name, target in targets.items():
                target.copy_(_split(values[name].to(target.device), target))

    def _restore_shards(self, folder: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Restore weights that were saved in shards.

        Args:
            folder: The checkpoint.
            tensors: What was saved whole.

        Returns:
            The state of the optimizer by name.
        """
        weights = self._weights()
        whole = {key: each for key, each in tensors.items() if key in weights}
        parameters = dict(self.model.named_parameters())
        moments = {}
        for key in shards.stored(folder / "optimizer"):
            parameter = parameters.get(key.rpartition("/")[0])
            if parameter is None:
                raise CheckpointError(
                    f"{folder / 'optimizer'} holds {key}, of a parameter that this model does not have."
                )
            moments[key] = torch.zeros_like(parameter, requires_grad=False)
        targets = {**{key: each for key, each in weights.items() if key not in whole}, **_prefixed(_OPTIMIZER, moments)}
        for part in _PARTS:
            shards.check(folder / part, _with_prefix(targets, f"{part}/"))
        for key, value in whole.items():
            if (value.shape, value.dtype) != (weights[key].shape, weights[key].dtype):
                raise CheckpointError(f"{folder / 'state.safetensors'} holds {key} of another shape or type.")
            weights[key].copy_(value)
        for part in _PARTS:
            shards.read(folder / part, _with_prefix(targets, f"{part}/"))
        return moments | _with_prefix(tensors, _OPTIMIZER)

    def _weights(self) -> dict[str, Tensor]:
        """Return the weights and the averaged weights, under the names of a sharded checkpoint."""
        return _prefixed("model/", self.model.state_dict()) | _prefixed("ema/", self.ema.model.state_dict())

    def _placed(self, moments: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the state of the optimizer with moments sharded as their parameters are."""
        parameters = dict(self.model.named_parameters())
        placed = {}
        for key, value in moments.items():
            name, _, kind = key.rpartition("/")
            like = parameters.get(name)
            sharded = isinstance(like, DTensor) and kind != "step" and value.shape == like.shape
            placed[key] = _split(value.to(like.device), like) if sharded and like is not None else value
        return placed


def _split(value: Tensor, like: Tensor) -> Tensor:
    """Return a tensor sharded as another one is. Every process has the whole value, so none sends anything."""
    if isinstance(value, DTensor) or not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def save_model(model: Any, folder: Path, info: dict[str, Any]) -> None:
    """Write a diffusers model into a folder, with the methods attached to it, and `info` as tokdyn.json."""
    model.save_pretrained(folder)
    if attachment_of(model) is not None:
        save(model, folder / METHODS)
    _write_info(folder, info)


def _write_info(folder: Path, info: dict[str, Any]) -> None:
    """Write the tokdyn.json beside weights."""
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


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under their names with a prefix."""
    return {prefix + key: value for key, value in tensors.items()}
