"""Convert the state of an optimizer to named tensors for a checkpoint, and load it from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokdyn.errors import CheckpointError


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

    Args:
        model: The model whose parameters the optimizer updates.
        optimizer: The optimizer; it keeps its settings. Moments are moved to the device of their parameter.
        tensors: The state by name.

    Raises:
        CheckpointError: There is state for a parameter that the model does not have.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    state: dict[Tensor, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition("/")
        if name not in parameters:
            raise CheckpointError(
                f"The checkpoint has optimizer state for {name}, which this model does not have; load it into the "
                "model that it was saved from."
            )
        state.setdefault(parameters[name], {})[moment] = value
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved = optimizer.state_dict()
    saved["state"] = {index: state[parameter] for index, parameter in enumerate(order) if parameter in state}
    optimizer.load_state_dict(saved)
