"""Rename the tensors of a state dict as other projects name them. Reading the result restores the model exactly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokdyn.checkpoints.infer import grid_of_table
from tokdyn.checkpoints.names import OFFICIAL, as_diffusers, rename, reverse
from tokdyn.errors import CheckpointError
from tokdyn.models import DCDiT, DiT

_PLAIN_TIME = {"timestep_map": (1.0, 0.0)}
FACEBOOK = {"timestep_shift": 0, "mlp_norm_eps": 1e-6, **_PLAIN_TIME}
"""Settings that facebook's DiT and official DC-DiT have, and diffusers' DiT does not."""


def to_official(model: DCDiT) -> dict[str, Tensor]:
    """Return the state dict of a DC-DiT under the names of the official code (AMD-AGI/DynamicChunkingDiT).

    Args:
        model: a model with patch size 1 and the spatial-predictability router; the official code has no others. That
            code always keeps the first and the last cell, so its outputs equal the model's only if force_ends=True.

    Returns:
        Copies of the tensors by name.

    Raises:
        CheckpointError: the official code has no model with these settings.
    """
    own = {"router": "spatial_predictability", "patch_size": 1, "position_scale": 1.0, "condition_adaptor": False}
    _require("the official DC-DiT", {**own, **FACEBOOK}, model)
    names = reverse(OFFICIAL)
    return {rename(name, names): tensor.clone() for name, tensor in model.state_dict().items()}


def to_facebook(model: DiT) -> dict[str, Tensor]:
    """Return copies of the tensors of a DiT under facebook's names, which are tokdyn's own.

    Raises:
        CheckpointError: the model has diffusers' settings, so that facebook's code would compute something else.
    """
    _require("facebook's DiT", FACEBOOK, model)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def to_diffusers(model: DiT, approximate: bool = False) -> dict[str, Tensor]:
    """Return the state dict of a DiT for diffusers' DiTTransformer2DModel.

    Args:
        model: a model with a square grid and the sine-cosine position table, which diffusers builds itself.
        approximate: also accept a model with facebook's timestep frequencies. diffusers has slightly different ones,
            so that its outputs differ.

    Returns:
        Copies of the tensors by name. Every block has a copy of the timestep and class embedders.

    Raises:
        CheckpointError: diffusers would compute something else.
    """
    _require("diffusers' DiT", _PLAIN_TIME, model)
    if len(model.state_dict()["blocks.0.mlp.fc1.bias"]) != 4 * model.config.hidden_size:
        raise CheckpointError(f"diffusers' DiT only has mlp_ratio=4, but this model has {model.config.mlp_ratio:g}.")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    grid = grid_of_table(tensors["pos_embed"][0])
    if grid is None or grid[0] != grid[1]:
        raise CheckpointError("diffusers' DiT only has sine-cosine positions on a square grid, unlike this model.")
    if model.config["timestep_shift"] != 1 and not approximate:
        raise CheckpointError(
            "diffusers' DiT computes other timestep frequencies than facebook's, so its outputs would differ; set "
            "approximate=True to write the weights nevertheless."
        )
    return as_diffusers(tensors, model.config["depth"])


def _require(target: str, settings: Mapping[str, Any], model: DiT | DCDiT) -> None:
    """Raise a CheckpointError if a model has other settings than the only ones that the target's code supports.

    Args:
        target: name of the other project's model, for error messages.
        settings: the supported value of each setting.
        model: the model to convert.
    """
    for name, supported in settings.items():
        value = model.config[name]
        if (tuple(value) if isinstance(value, list) else value) != supported:
            raise CheckpointError(
                f"{target} only has {name}={supported!r}, but this model has {value!r}; convert it to another layout."
            )
