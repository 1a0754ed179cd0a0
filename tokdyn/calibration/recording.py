"""Keeping what a model is called with, so that a calibration can call it again."""

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
    """Within this context every call of the model, or of its forward, leaves its arguments, in order.

    Args:
        model: wrapped or not; of a pipeline give the transformer, as in `recording(pipe.transformer)`.
        host: keep tensors in the memory of the host, where an accelerator has none to spare.

    Yields:
        A list that grows with every call. Tensors are copies; one that has not changed since the call before is kept
        once.

    Raises:
        InputError: this is not a model.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"a {type(model).__name__} is not a model whose calls can be recorded; give a torch module, such as "
            "pipe.transformer of a pipeline."
        )
    names = argument_names(model)
    calls: list[Call] = []

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def keep(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        before = calls[-1] if calls else {}
        with torch.inference_mode(False), torch.no_grad():  # what is kept can be used in any mode
            calls.append({name: _copied(value, before.get(name), host) for name, value in named.items()})

    plain, own = model.forward, model.__dict__.get("forward")  # its own where offloading put one

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        keep(args, kwargs)
        return plain(*args, **kwargs)

    model.forward = forward
    try:
        yield calls
    finally:
        del model.forward
        if own is not None:
            model.forward = own


def listed(calls: Iterable[Mapping[str, Any]]) -> list[Call]:
    """Calls as a list that can be gone through more than once.

    Raises:
        InputError: there are none, or they are not the arguments of calls.
    """
    found = list(calls)
    if not found:
        raise InputError("there are no calls to calibrate on; record some with tokdyn.recording(model).")
    for call in found:
        if not isinstance(call, Mapping) or not call:
            raise InputError(
                f"a call to calibrate on is a {type(call).__name__}, expected a dictionary of the arguments of the "
                "model by name, as tokdyn.recording keeps them."
            )
    return [dict(call) for call in found]


def moved(value: Any, device: torch.device) -> Any:
    """The tensors of an argument on a device, and new lists and dictionaries, which models may change."""
    return _each(value, lambda tensor, _: tensor.to(device), None)


def _copied(value: Any, before: Any, host: bool) -> Any:
    def copy(tensor: Tensor, last: Any) -> Tensor:
        made = tensor.detach().to("cpu" if host else tensor.device, copy=True)
        if isinstance(last, Tensor) and last.dtype == made.dtype and torch.equal(last, made):
            return last
        return made

    return _each(value, copy, before)


def _each(value: Any, change: Callable[[Tensor, Any], Tensor], beside: Any) -> Any:
    """The same structure with every tensor changed; `beside` may hold something of that structure."""
    if isinstance(value, Tensor):
        return change(value, beside)
    if isinstance(value, Mapping):
        other = beside if isinstance(beside, Mapping) else {}
        return {name: _each(part, change, other.get(name)) for name, part in value.items()}
    if isinstance(value, list | tuple):
        others = beside if isinstance(beside, list | tuple) and len(beside) == len(value) else [None] * len(value)
        parts = [_each(part, change, other) for part, other in zip(value, others, strict=True)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value
