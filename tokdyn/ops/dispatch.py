"""The seam between the plain functions of `tokdyn.ops` and their faster forms for the CPU.

A function that is decorated with `has_cpu_form` is its formula in plain PyTorch. `tokdyn.ops.cpu` registers a faster
form of it with `cpu_form`. A call on a CPU tensor asks the CPU form first, which returns None where the plain function
is the better choice. Compiled, traced and transformed code always runs the plain function, and so does everything
within `plain()`. Forms with gradients of their own leave second derivatives to a plain function.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tokdyn.ops import torch_private

P = ParamSpec("P")
T = TypeVar("T")

_plain: ContextVar[bool] = ContextVar(
    "tokdyn_plain_ops", default=os.environ.get("TOKDYN_PLAIN_OPS", "0") not in ("", "0")
)
_forms: dict[Callable[..., Any], Callable[..., Any]] = {}


@contextmanager
def plain() -> Iterator[None]:
    """Run the plain functions instead of their CPU forms within this context.

    The environment variable `TOKDYN_PLAIN_OPS=1` does the same for the whole process.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def is_plain() -> bool:
    """Whether the plain functions were asked for, by `plain()` or the environment."""
    return _plain.get()


def has_cpu_form(function: Callable[P, T]) -> Callable[P, T]:
    """Let the registered CPU form of a function answer where it can.

    Args:
        function: the plain function; its first argument is the tensor that decides whether a call is on the CPU.
    """
    first = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def dispatched(*args: P.args, **kwargs: P.kwargs) -> T:
        if may_replace(args[0] if args else kwargs[first]):
            form: Callable[P, T | None] | None = _forms.get(dispatched)
            out = None if form is None else form(*args, **kwargs)
            if out is not None:
                return out
        return function(*args, **kwargs)

    return dispatched


def cpu_form(function: Callable[P, T]) -> Callable[[Callable[P, T | None]], Callable[P, T | None]]:
    """Register the decorated function as the CPU form of a plain one; it returns None to leave a call to that."""

    def register(form: Callable[P, T | None]) -> Callable[P, T | None]:
        _forms[function] = form
        return form

    return register


def cpu_forms() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Return the CPU form of every function that has one."""
    return MappingProxyType(_forms)


def synchronises(x: Tensor) -> bool:
    """Whether reading a value of this tensor, as `.item()` does, would make the host wait for queued work.

    True on every accelerator. Also true while a graph is compiled, and for tensors without values, since there is
    nothing to read then.
    """
    return x.device.type != "cpu" or torch.compiler.is_compiling() or is_fake(x)


def is_fake(x: Tensor) -> bool:
    """Whether a tensor has a shape and no values (torch's fake tensors), as in a step that is only rehearsed."""
    return type(x) is not Tensor and hasattr(x, "fake_mode")


def may_replace(x: Any) -> bool:
    """Whether CPU forms may run on this: an ordinary tensor on the CPU, outside of graphs, traces and transforms."""
    return (
        not synchronises(x)
        and not is_plain()
        and type(x) in (Tensor, torch.nn.Parameter)
        and torch_private.runs_plainly()
    )


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
