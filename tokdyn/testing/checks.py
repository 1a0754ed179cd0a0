"""Hold a method, or all methods that fit a model, to the laws."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tokdyn.adapters import adapter_for
from tokdyn.attach import unsupported
from tokdyn.errors import InputError
from tokdyn.methods import METHODS, Method
from tokdyn.testing.laws import LAWS, Case
from tokdyn.tokens import cells
from tokdyn.trace.calls import CallTrace


def check_method(
    method: Method | Sequence[Method],
    model: nn.Module,
    call: Mapping[str, Any],
    *,
    shared: Collection[str] = (),
    tolerance: float = 1e-4,
    prepare: Callable[[nn.Module], object] | None = None,
) -> None:
    """Hold a method to the laws on a model.

    Args:
        method: one, or a stack of them.
        model: not wrapped; it stays as it is.
        call: keyword arguments of a call, for a batch of at least two samples.
        shared: names of arguments that have no batch, such as position ids.
        tolerance: largest difference that rounding explains.
        prepare: changes each wrapped model in place before it is used, as `tokdyn.calibrate_router` does.

    Raises:
        AssertionError: a law is broken; the message says which and by how much.
        InputError: the call has a single sample.
    """
    methods = (method,) if isinstance(method, Method) else tuple(method)
    case = Case(lambda: copy.deepcopy(model), call, methods, shared, tolerance, prepare)
    if case.batch < 2:
        raise InputError(f"the call has {case.batch} sample, and the laws compare samples; give it at least two.")
    for law in LAWS:
        law(case)


def check_adapter(
    model: nn.Module, call: Mapping[str, Any], *, shared: Collection[str] = (), tolerance: float = 1e-4
) -> tuple[str, ...]:
    """Hold the adapter of a model to what it declares, and every method that fits the model to the laws.

    Args:
        model: not wrapped; it stays as it is.
        call: keyword arguments of a call, for a batch of at least two samples.
        shared: names of arguments that have no batch, such as position ids.
        tolerance: largest difference that rounding explains.

    Returns:
        The methods that were checked, as one writes them.

    Raises:
        AssertionError: the adapter or a method breaks a law.
        UnsupportedModelError: there is no adapter for the model.
    """
    adapter = adapter_for(model)
    name = f"adapter {adapter.name!r}"
    if adapter.level is not None:
        levels = CallTrace(adapter.level(model, call)).levels
        inside = bool(((levels >= 0) & (levels <= 1)).all())
        assert inside, f"the {name} reads the noise levels {levels.tolist()}, not all within 0 (image) and 1 (noise)"
    if adapter.grid is not None:
        grid = adapter.grid(model, call)
        assert min(grid) >= 1, f"the {name} reads the grid {grid}"
        _check_tokens(model, call, cells(grid))
    checked = []
    for kind in METHODS.values():
        for method in kind.examples():
            if unsupported(adapter, method) is None:
                check_method(method, model, call, shared=shared, tolerance=tolerance)
                checked.append(repr(method))
    assert checked, f"no method fits the models of the {name}"
    return tuple(checked)


@torch.no_grad()
def _check_tokens(model: nn.Module, call: Mapping[str, Any], count: int) -> None:
    """Compare the cells of the grid with the tokens that the first block gets."""
    adapter, seen = adapter_for(model), []
    first = next(iter(model.get_submodule(adapter.blocks[0].path).children()))
    names = adapter.blocks[0].tokens

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get(names, args[0] if args else None)
        seen.append(None if tokens is None else tokens.shape)

    handle = first.register_forward_pre_hook(look, with_kwargs=True)
    try:
        model(**call)
    finally:
        handle.remove()
    assert seen, f"the adapter {adapter.name!r} says that {adapter.blocks[0].path!r} runs, but its first block did not"
    if adapter.blocks[0].image == "all" and adapter.blocks[0].packing is None:
        assert seen[0] is not None
        assert seen[0][1] == count, (
            f"the adapter {adapter.name!r} reads a grid of {count} cells, but the first block gets {seen[0][1]} tokens"
        )
