"""Second derivatives of functions whose fast gradients cannot be differentiated themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def differentiable_gradients(
    function: Callable[..., Tensor], arguments: tuple[Any, ...], gradient: Tensor
) -> tuple[Tensor | None, ...]:
    """Compute gradients by running a plain function again, so that they can be differentiated.

    For a backward pass that was asked for a graph of its own (`create_graph=True`), in which grad mode is on.

    Args:
        function: what the fast forward computed, in operators that have second derivatives.
        arguments: of the function, saved as inputs so that they are still part of the graph.
        gradient: of the function's result.

    Returns:
        One entry for each argument: its gradient, or None if it requires none.
    """
    wanted = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", enabled=False):  # fused attention is differentiable once
        out = function(*arguments)
    found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=True, allow_unused=True))
    return tuple(next(found) if isinstance(x, Tensor) and x.requires_grad else None for x in arguments)
