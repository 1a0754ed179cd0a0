"""State dicts under other projects' names; the exact inverse of reading them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tokdyn.checkpoints.infer import grid_of_table
from tokdyn.checkpoints.names import OFFICIAL, as_diffusers, renamed, reverse
from tokdyn.errors import CheckpointError
from tokdyn.models import DCDiT, DiT

CLOCK = {"timestep_map": (1.0, 0.0)}
FACEBOOK = {"timestep_shift": 0, "mlp_norm_eps": 1e-6, **CLOCK}
"""Settings of facebook's DiT, and of official DC-DiT, that diffusers' DiT has otherwise."""


def to_official(model: DCDiT) -> dict[str, Tensor]:
    """The state dict of a DC-DiT under the names of the official code (AMD-AGI/DynamicChunkingDiT).

    Args:
        model: with patch size 1 and the spatial-predictability router, the only ones that code has. It forces the
            first and the last cell, so it computes the same only for a model with force_ends=True.

    Returns:
        Copies of the tensors by name.

    Raises:
        CheckpointError: the official code has no such model.
    """
    own = {"router": "spatial_predictability", "patch_size": 1, "position_scale": 1.0, "condition_adaptor": False}
    _only("the official DC-DiT", {**own, **FACEBOOK}, model)
    names = reverse(OFFICIAL)
    return {renamed(name, names): tensor.clone() for name, tensor in model.state_dict().items()}


def to_facebook(model: DiT) -> dict[str, Tensor]:
    """The state dict of a DiT under facebook's names, which are tokdyn's own.

    Raises:
        CheckpointError: the model computes what diffusers' DiT does, and facebook's would compute something else.
    """
    _only("facebook's DiT", FACEBOOK, model)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def to_diffusers(model: DiT, approximate: bool = False) -> dict[str, Tensor]:
    """The state dict of a DiT for diffusers' DiTTransformer2DModel.

    Args:
        model: on a square grid with the fixed position table, which diffusers makes itself.
        approximate: also write a model with facebook's timestep frequencies. diffusers computes slightly different
            ones from the same weights, so outputs change.

    Returns:
        Copies of the tensors by name; the embedders are repeated in every block.

    Raises:
        CheckpointError: diffusers would compute something else.
    """
    _only("diffusers' DiT", CLOCK, model)
    if len(model.state_dict()["blocks.0.mlp.fc1.bias"]) != 4 * model.config.hidden_size:
        raise CheckpointError(f"diffusers' DiT has mlp_ratio=4 only, and this model has {model.config.mlp_ratio:g}.")
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    grid = grid_of_table(tensors["pos_embed"][0])
    if grid is None or grid[0] != grid[1]:
        raise CheckpointError("diffusers' DiT has sine-cosine positions on a square grid only, and this model has not.")
    if model.config["timestep_shift"] != 1 and not approximate:
        raise CheckpointError(
            "diffusers' DiT computes other timestep frequencies than facebook's, so outputs would change; "
            "approximate=True writes the weights all the same."
        )
    return as_diffusers(tensors, model.config["depth"])


def _only(whose: str, settings: Mapping[str, Any], model: DiT | DCDiT) -> None:
    """Refuse a model with other settings than the only ones that another code has."""
    for name, only in settings.items():
        value = model.config[name]
        if (tuple(value) if isinstance(value, list) else value) != only:
            raise CheckpointError(f"{whose} has {name}={only!r} only, and this model has {value!r}.")
