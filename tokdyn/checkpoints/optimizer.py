"""Convert the state of an optimizer to named tensors for a checkpoint, and load it from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokdyn.errors import CheckpointError

_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, which also counts its steps


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer as tensors named PARAMETER/STATE, such as "blocks.0.norm.weight/exp_avg"."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{moment}": torch.as_tensor(value)
        for parameter, state in optimizer.state.items()
        for moment, value in state.items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Load the state that `optimizer_tensors` returned into an optimizer, in place.

    Everything is checked first: torch's fused AdamW reads beyond the end of moments that are too short.

    Args:
        model: The model whose parameters the optimizer updates.
        optimizer: An AdamW; it keeps its settings. Moments are moved to the device of their parameter.
        tensors: The state by name.

    Raises:
        CheckpointError: There is state for a parameter that the model does not have or that is not trained, or its
            names, shapes or types are not those of AdamW.
    """
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained = set(order)
    parameters: dict[str, Tensor] = {name: each for name, each in model.named_parameters() if each in trained}
    state: dict[Tensor, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition("/")
        if name not in parameters:
            raise CheckpointError(
                f"The checkpoint has optimizer state for {name}, which this model does not have or not train; load "
                "it into the model that it was saved from."
            )
        _check(key, moment, value, parameters[name])
        state.setdefault(parameters[name], {})[moment] = value
    for name, parameter in parameters.items():
        if parameter in state and (missing := {"step", *_MOMENTS} - state[parameter].keys()):
            raise CheckpointError(
                f"The checkpoint's optimizer state lacks {name}/{min(missing)}; use an earlier checkpoint."
            )
    saved = optimizer.state_dict()
    saved["state"] = {index: state[parameter] for index, parameter in enumerate(order) if parameter in state}
    optimizer.load_state_dict(saved)


def _check(key: str, moment: str, value: Tensor, parameter: Tensor) -> None:
    """Raise a CheckpointError unless a tensor can be a part of the state of a parameter."""
    if moment in _MOMENTS:
        shape, dtype = tuple(parameter.shape), parameter.dtype
    elif moment == "step":
        shape, dtype = (), torch.float32
    else:
        raise CheckpointError(f"The checkpoint has optimizer state {key}, which AdamW does not have; use another one.")
    if (tuple(value.shape), value.dtype) != (shape, dtype):
        raise CheckpointError(
            f"The checkpoint's optimizer state {key} is {value.dtype} of shape {tuple(value.shape)}, expected {dtype} "
            f"of {shape}; use an earlier checkpoint."
        )
