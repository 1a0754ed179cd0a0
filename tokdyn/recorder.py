"""Record the arguments of a model's calls, so that calibration and distillation can repeat the calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.attach import argument_names
from tokdyn.errors import InputError

Call = dict[str, Any]
"""The arguments of one call of a model, by name."""


@contextmanager
def recording(model: nn.Module, host: bool = False) -> Iterator[list[Call]]:
    """Record the arguments of every call of the model, or of its forward, within this context.

    Args:
        model: wrapped or not.
        host: copy tensors to the memory of the host, if the accelerator has none to spare.

    Yields:
        A list that grows with every call. Tensors are copied; one that equals that of the previous call is stored once.

    Raises:
        InputError: `model` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"a {type(model).__name__} has no calls that can be recorded; give a torch module, or a pipeline."
        )
    names = argument_names(model)
    calls: list[Call] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        before = calls[-1] if calls else {}
        with torch.inference_mode(False), torch.no_grad():  # no inference tensors, which could not be used everywhere
            calls.append({name: _copied(value, before.get(name), host) for name, value in named.items()})

    plain, own = model.forward, model.__dict__.get("forward")  # offloading sets a forward on the instance

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        record(args, kwargs)
        return plain(*args, **kwargs)

    model.forward = forward
    try:
        yield calls
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def listed(calls: Iterable[Mapping[str, Any]]) -> list[Call]:
    """Return calls as a list that can be traversed more than once.

    Raises:
        InputError: the list is empty, or holds something other than the arguments of calls.
    """
    recorded = list(calls)
    if not recorded:
        raise InputError("there are no calls to calibrate on; record some with tokdyn.recording(model).")
    for call in recorded:
        if not isinstance(call, Mapping) or not call:
            raise InputError(
                f"a call to calibrate on is a {type(call).__name__}; expected a dictionary of the arguments of the "
                "model by name, as tokdyn.recording returns them."
            )
    return [dict(call) for call in recorded]


def moved(value: Any, device: torch.device) -> Any:
    """Move the tensors of an argument to a device, in new lists and dictionaries that the model may change."""
    return _map_tensors(value, lambda tensor, _: tensor.to(device), None)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients; every module gets its own mode back."""
    training = [part for part in model.modules() if part.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True


def _copied(value: Any, before: Any, host: bool) -> Any:
    """Copy the tensors of an argument, except those that equal those of the previous call."""

    def copy(tensor: Tensor, last: Any) -> Tensor:
        copied = tensor.detach().to("cpu" if host else tensor.device, copy=True)
        if isinstance(last, Tensor) and last.dtype == copied.dtype and torch.equal(last, copied):
            return last
        return copied

    return _map_tensors(value, copy, before)


def _map_tensors(value: Any, change: Callable[[Tensor, Any], Tensor], beside: Any) -> Any:
    """Change every tensor of a nested structure; `beside` may have a counterpart for it in the same place."""
    if isinstance(value, Tensor):
        return change(value, beside)
    if isinstance(value, Mapping):
        other = beside if isinstance(beside, Mapping) else {}
        return {name: _map_tensors(part, change, other.get(name)) for name, part in value.items()}
    if isinstance(value, list | tuple):
        others = beside if isinstance(beside, list | tuple) and len(beside) == len(value) else [None] * len(value)
        parts = [_map_tensors(part, change, other) for part, other in zip(value, others, strict=True)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
