"""Shard weights, gradients and moments over the processes of a training, with FSDP2 (`torch.distributed.fsdp`).

The recipe asks for it, or accelerate's configuration. What such a configuration asks for beyond that is honoured or
refused. Between two steps every process holds its rows of every weight; a block is gathered while it computes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from tokdyn.errors import RecipeError
from tokdyn.recipe import Recipe
from tokdyn.team import ENGINES, USE_FSDP, asks_for

_OPTIONS = {  # variable that accelerate sets: what it means if it is not set, and the values that training honours
    "FSDP_VERSION": ("1", ("2",)),
    "FSDP_AUTO_WRAP_POLICY": ("NO_WRAP", ("TRANSFORMER_BASED_WRAP",)),
    "FSDP_TRANSFORMER_CLS_TO_WRAP": ("DiTBlock", ("DiTBlock",)),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", ("true", "false")),
    "FSDP_STATE_DICT_TYPE": ("SHARDED_STATE_DICT", ("SHARDED_STATE_DICT",)),
    "FSDP_OFFLOAD_PARAMS": ("false", ("false",)),
    "FSDP_FORWARD_PREFETCH": ("false", ("false",)),
    "FSDP_ACTIVATION_CHECKPOINTING": ("false", ("false",)),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("false", ("false",)),
    "FSDP_IGNORED_MODULES": ("", ("",)),
    "ACCELERATE_MIXED_PRECISION": ("no", ("no",)),
    "ACCELERATE_DYNAMO_BACKEND": ("no", ("no",)),
}
_NO_EFFECT = (  # accelerate always sets them, but FSDP2 does not have them, or they say how transformers loads weights
    "FSDP_SHARDING_STRATEGY",
    "FSDP_MIN_NUM_PARAMS",
    "FSDP_BACKWARD_PREFETCH",
    "FSDP_USE_ORIG_PARAMS",
    "FSDP_CPU_RAM_EFFICIENT_LOADING",
    "FSDP_SYNC_MODULE_STATES",
)


@dataclass(frozen=True)
class Sharding:
    """How weights are sharded.

    Attributes:
        reshard: Free the gathered weights of a block after its forward pass, and gather them again for its backward
            pass. Without it they stay in memory between the two.
    """

    reshard: bool = True

    def shard(self, model: Any, accelerator: Accelerator) -> None:
        """Shard the blocks of a model, and all of its other weights together, in place. Every process calls it.

        Args:
            model: A DiT or DCDiT on the device of this process, with the same weights in every process.
            accelerator: Knows the device and the processes.
        """
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=self.reshard)
        fully_shard(model, mesh=mesh)
        if hasattr(model, "route"):
            register_fsdp_forward_method(model, "route")


def asked_sharding(recipe: Recipe, environ: Mapping[str, str] = os.environ) -> Sharding | None:
    """Return how the recipe, or the launcher by variables that accelerate reads, asks to shard weights; None for not.

    Raises:
        RecipeError: The launcher asks for what training does not do, or recipe and launcher contradict each other.
    """
    for variable, engine in ENGINES.items():
        if asks_for(variable, environ):
            raise RecipeError(
                f"The launcher asks for {engine} ({variable}), and training shards weights with FSDP2 alone; launch it "
                "with torchrun and training.sharding=full, or with a configuration of accelerate that has "
                "distributed_type: FSDP and fsdp_version: 2."
            )
    training = recipe.training
    launched = asks_for(USE_FSDP, environ)
    if not launched and training.sharding != "full":
        return None
    if launched:
        if training.sharding == "none":
            raise RecipeError(
                f"training.sharding is none, but the launcher asks for FSDP ({USE_FSDP}); leave training.sharding "
                "out, or launch replicas."
            )
        _check_options(recipe, environ)
    if training.compile:
        raise RecipeError(
            f"training.compile is {training.compile!r}, and sharded weights are not compiled; set "
            "training.compile=false, or train replicas with training.sharding=none."
        )
    return Sharding(_value(environ, "FSDP_RESHARD_AFTER_FORWARD").lower() == "true" if launched else True)


def sharding_of(recipe: Recipe, accelerator: Accelerator) -> Sharding | None:
    """Return how a run shards its weights: as `asked_sharding`, but None in a process that was launched alone."""
    return None if accelerator.distributed_type == DistributedType.NO else asked_sharding(recipe)


def _value(environ: Mapping[str, str], variable: str) -> str:
    """Return the value of an option of FSDP; the one that it has by default if it is not set."""
    return environ.get(variable) or _OPTIONS[variable][0]


def _check_options(recipe: Recipe, environ: Mapping[str, str]) -> None:
    """Check that training honours everything that accelerate's configuration of FSDP asks for.

    Raises:
        RecipeError: It does not; the message names the option.
    """
    also = {}
    if recipe.training.gradient_checkpointing:
        also["FSDP_ACTIVATION_CHECKPOINTING"] = "true"
    if recipe.training.precision == "bf16":
        also["ACCELERATE_MIXED_PRECISION"] = "bf16"
    cures = {
        "FSDP_ACTIVATION_CHECKPOINTING": ", and training.gradient_checkpointing=true in the recipe",
        "ACCELERATE_MIXED_PRECISION": ", and training.precision in the recipe",
        "ACCELERATE_DYNAMO_BACKEND": " (sharded weights are not compiled)",
    }
    for variable, (_, honoured) in _OPTIONS.items():
        value, allowed = _value(environ, variable), (*honoured, also.get(variable, honoured[0]))
        if value.lower() not in (each.lower() for each in allowed):
            option = variable.removeprefix("ACCELERATE_").lower()
            raise RecipeError(
                f"The launcher's {option} is {value} ({variable}), which training cannot honour; set {option}: "
                f"{honoured[0] or 'null'}{cures.get(variable, '')} in accelerate's configuration."
            )
    known = {*_OPTIONS, *_NO_EFFECT}
    if unknown := sorted(each for each in environ if each.startswith("FSDP_") and each not in known):
        raise RecipeError(
            f"The launcher sets {unknown[0]}={environ[unknown[0]]}, an option of FSDP that training does not know; "
            "leave it out."
        )


def local(tensor: Tensor) -> Tensor:
    """Return the rows of a tensor that this process holds: a tensor that is not sharded itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale gradients in place so that the norm of all of them together is at most `limit`; return the norm before.

    Every process calls it if they are sharded, and gets the same norm.
    """
    parameters = list(parameters)
    norm = get_total_norm([each.grad for each in parameters if each.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    clip_grads_with_norm_(parameters, limit, norm)
    return norm


def skeleton_of(model: Any) -> Any:
    """Return a copy of a model without its values: all tensors are on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)


def gathered(model: Any, skeleton: Any, keep: bool) -> Any:
    """Gather a sharded model. Every process calls it.

    Args:
        model: The sharded model.
        skeleton: A copy of it from before it was sharded, on the meta device.
        keep: Whether this process needs the result.

    Returns:
        A model with the whole weights, on the same device; None if it is not needed.
    """
    values = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if isinstance(value, DTensor) else value.clone()
        if keep:
            values[name] = whole
    if not keep:
        return None
    result = copy.deepcopy(skeleton)
    result.load_state_dict(values, assign=True)
    return result
