"""Check a method, or an adapter with all methods that can be attached to its models, against the laws."""

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
from tokdyn.tokens import total
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
    """Check a method, or several together, against all laws on a model.

    Args:
        method: the method, or a stack of methods.
        model: a model that is not wrapped; copies of it are wrapped.
        call: keyword arguments of a call of the model, for a batch of at least two samples.
        shared: names of arguments that have no batch axis, such as position ids.
        tolerance: largest difference that rounding explains, of predictions and, relative to their largest entry, of
            gradients.
        prepare: changes each wrapped model in place before it is used, as `tokdyn.calibrate_router` does.

    Raises:
        AssertionError: a law is broken; the message says which and by how much.
        InputError: the call has a single sample.
        CompositionError, UnsupportedModelError, InputError: the methods cannot be attached, as in `tokdyn.wrap`.
    """
    methods = (method,) if isinstance(method, Method) else tuple(method)
    case = Case(lambda: copy.deepcopy(model), call, methods, shared, tolerance, prepare)
    if case.batch < 2:
        raise InputError(f"the call has {case.batch} sample, but the laws compare samples; give it at least two.")
    for law in LAWS:
        law(case)


def check_adapter(
    model: nn.Module, call: Mapping[str, Any], *, shared: Collection[str] = (), tolerance: float = 1e-4
) -> tuple[str, ...]:
    """Check the adapter of a model: its noise levels and grid, and all laws for every method that can be attached.

    Args:
        model: a model that is not wrapped; copies of it are wrapped.
        call: keyword arguments of a call of the model, for a batch of at least two samples.
        shared: names of arguments that have no batch axis, such as position ids.
        tolerance: largest difference between predictions that rounding explains.

    Returns:
        The methods that were checked, as Python expressions.

    Raises:
        AssertionError: the adapter reads something impossible, or a method breaks a law.
        UnsupportedModelError: the model has no adapter, and none can be inferred.
        InputError: the call has a single sample.
    """
    adapter = adapter_for(model)
    name = f"adapter {adapter.name!r}"
    if adapter.level is not None:
        levels = CallTrace(adapter.level(model, call)).levels
        in_range = bool(((levels >= 0) & (levels <= 1)).all())
        assert in_range, f"the {name} reads noise levels {levels.tolist()}; they must lie from 0 (image) to 1 (noise)"
    if adapter.grid is not None:
        images = adapter.image_tokens(model, call)
        for grid in (images.grid, *images.references):
            assert min(grid) >= 1, f"the {name} reads the grid {grid}; every size must be at least 1"
        case = Case(lambda: copy.deepcopy(model), call, (), shared)
        _check_tokens(model, call, case.batch, total(images))
    checked = []
    for kind in METHODS.values():
        for method in kind.examples():
            if unsupported(adapter, method) is None:
                check_method(method, model, call, shared=shared, tolerance=tolerance)
                checked.append(repr(method))
    assert checked, f"no method can be attached to the models of the {name}"
    return tuple(checked)


@torch.no_grad()
def _check_tokens(model: nn.Module, call: Mapping[str, Any], batch: int, count: int) -> None:
    """Check that the first block runs and gets as many tokens as the grid has cells, unless it gets text as well.

    A block may get the tokens of a sample in parts, such as its frames, or with the samples on the second axis.
    """
    adapter, shapes = adapter_for(model), []
    first = next(iter(model.get_submodule(adapter.blocks[0].path).children()))
    name = adapter.blocks[0].tokens

    def record_shape(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs.get(name, args[0] if args else None)
        shapes.append(None if tokens is None else tokens.shape)

    handle = first.register_forward_pre_hook(record_shape, with_kwargs=True)
    try:
        model(**call)
    finally:
        handle.remove()
    blocks = adapter.blocks[0]
    assert shapes, f"the adapter {adapter.name!r} declares blocks in {blocks.path!r}, but the first of them did not run"
    if blocks.image == "all" and blocks.packing is None:
        assert shapes[0] is not None
        tokens = shapes[0][:-1].numel() / batch
        assert tokens == count, (
            f"the adapter {adapter.name!r} reads a grid of {count} cells, but the first block gets {tokens:g} tokens"
        )
