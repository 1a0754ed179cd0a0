"""Support gradient checkpointing: recompute blocks in the backward pass under the conditions of their first call.

There are two cases. Models of diffusers store the function that checkpoints; `bind` replaces it for one call of the
model, so that brackets and gates act outside of the recomputed part, and nothing is drawn, decided or counted twice.
Other models (timm, forks of the public DiT) call `torch.utils.checkpoint` in their forward. Their blocks are called
again after the call of the model has ended, with the same tensor of tokens as the first time, and by this tensor
`Replays` looks up the frame of the first time.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tokdyn.attach import class_swap
from tokdyn.attach.context import CallContext
from tokdyn.attach.engine import call_block
from tokdyn.attach.handlers.base import Exchange, Frame
from tokdyn.attach.sites import Site
from tokdyn.attach.view import FollowedArguments
from tokdyn.errors import InputError

_FUNCTION = "_gradient_checkpointing_func"
_TOKENS = object()  # stands in a stored frame for the tokens it is looked up by, which it must not keep alive
_NEXT = 0  # in place of the id of a block: whichever block is called next
_REPLAYS: WeakKeyDictionary[nn.Module, ReferenceType[Replays]] = WeakKeyDictionary()
_HIDDEN: WeakSet[nn.Module] = WeakSet()  # blocks that ran without gradients in a call of the model with gradients


class Replays:
    """The frames of a model's block calls, by the tensor of tokens that the block got, as long as that tensor lives."""

    def __init__(self) -> None:
        self._frames: Any = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._frames)

    def __reduce__(self) -> Any:
        return Replays, ()

    def remember(self, frame: Frame, module: nn.Module, site: Site, named: dict[str, Any]) -> None:
        """Store the frame of a block that is about to be called, with its arguments by name."""
        if torch.compiler.is_compiling():
            return
        if not torch.is_grad_enabled():
            _HIDDEN.add(module)
            return
        tokens = named[site.blocks.tokens]
        _REPLAYS[module] = ref(self)
        self._frames.setdefault(tokens, {})[id(module)] = _detached(frame, tokens, _TOKENS)

    def find(self, module: nn.Module, value: Any) -> Frame | None:
        """Return the frame stored for a block and one of its arguments; None if there is none."""
        frames = self._frames.get(value) if isinstance(value, Tensor) else None
        frame: Frame | None = frames and (frames.get(id(module)) or frames.get(_NEXT))
        return None if frame is None else _detached(frame, _TOKENS, value)

    def go_on(self, frame: Frame, site: Site, out: Any) -> None:
        """Store the frame of a recomputed block for its result `out`, so that a block recomputed next finds it."""
        tokens = out[site.blocks.returns.index("tokens")] if isinstance(out, tuple) else out
        self._frames.setdefault(tokens, {})[_NEXT] = _detached(frame, tokens, _TOKENS)


def call_outside(module: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module of a wrapped model while no call of the model is running.

    A block that is called by the backward pass is recomputed in its frame. Any other call is the original call.

    Args:
        module: the module.
        plain: its original call, `plain(module, *args, **kwargs)`.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.

    Raises:
        InputError: the backward pass recomputes a block by reentrant checkpointing, which hides the tensors by which
            frames are looked up.
    """
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() < 0:
        return plain(module, *args, **kwargs)
    reference = _REPLAYS.get(module)
    replays = None if reference is None else reference()
    for value in (*args, *kwargs.values()):
        frame = None if replays is None else replays.find(module, value)
        if replays is not None and frame is not None:
            site = frame.sites[id(module)]
            call = frame.context.residency.around(module, plain)
            out = class_swap.within(frame, call_block, frame, module, site, call, args, kwargs)
            replays.go_on(frame, site, out)
            return out
    if module in _HIDDEN:
        raise InputError(
            "gradient checkpointing with use_reentrant=True cannot recompute the blocks of a wrapped model; set "
            "use_reentrant=False."
        )
    return plain(module, *args, **kwargs)


def _detached(frame: Frame, old: Any, new: Any) -> Frame:
    """Copy a frame so that running blocks in it changes neither trace nor losses of its call.

    In the state of the handlers, the object `old` is replaced by `new`.
    """
    context = copy.copy(frame.context)
    context.trace, context.losses, context.arguments, context.guard = context.trace.blank(), {}, {}, None
    context.readings = replace(context.readings, followed=FollowedArguments())
    context.slots = [_replaced(state, old, new) for state in context.slots]
    return frame._replace(context=context, remember=None)


def _replaced(state: Any, old: Any, new: Any) -> Any:
    """Copy the state of a handler; where it is or holds the object `old`, the copy has `new`."""
    if not is_dataclass(state) or isinstance(state, type):
        return new if state is old else state
    changed = {field.name: new for field in fields(state) if getattr(state, field.name) is old}
    return replace(state, **changed) if changed else copy.copy(state)


def bind(model: nn.Module, frame: Frame) -> list[tuple[nn.Module, Any]]:
    """Let the checkpointing function of a diffusers model, if it has one, run blocks through the engine in this frame.

    Returns:
        The modules and functions that `release` restores after the call.
    """
    bound = []
    for module in model.modules():
        function = module.__dict__.get(_FUNCTION)
        if function is not None:
            bound.append((module, function))
            module.__dict__[_FUNCTION] = _checkpointing(function, frame)
    return bound


def release(bound: list[tuple[nn.Module, Any]]) -> None:
    """Restore the functions that `bind` replaced."""
    for module, function in bound:
        module.__dict__[_FUNCTION] = function


def _checkpointing(function: Any, frame: Frame) -> Any:
    """Return a checkpointing function that checkpoints a block inside of the brackets, gates and kernels around it."""

    def checkpoint(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        site = frame.sites.get(id(module))
        if site is None:
            return function(module, *args, **kwargs)
        if kwargs:  # HunyuanImage names some, but only positional arguments are passed on
            kind: Any = class_swap.base_class(module)
            bound = inspect.signature(kind.forward).bind(module, *args, **kwargs)
            bound.apply_defaults()
            args = bound.args[1:]
        return call_block(frame._replace(remember=None), module, site, _Checkpointed(function, module, frame), args, {})

    return checkpoint


class _Checkpointed:
    """The original call of a block under checkpointing, which is recomputed in the frame of the first time.

    Tensors of the frame's exchange become arguments and results of the checkpointed function.
    """

    def __init__(self, function: Any, module: nn.Module, root: Frame) -> None:
        self._function, self._module, self._root = function, module, root

    def __call__(self, *args: Any) -> Any:
        frame: Frame = class_swap.current() or self._root
        exchange = frame.exchange
        names, given = list(exchange.given), list(exchange.given.values())
        keys: list[Any] = []
        runs, several = 0, False

        def computed(*again: Any) -> Any:
            nonlocal runs, several
            inside = Exchange(exchange.samples, dict(zip(names, again[len(args) :], strict=True)))
            here = frame._replace(exchange=inside)
            if runs:  # a recomputation adds nothing to traces and losses
                here = _without_records(here)._replace(exchange=inside)
            runs += 1
            out = class_swap.within(
                here, class_swap.base_class(self._module).__call__, self._module, *again[: len(args)]
            )
            several, keys[:] = isinstance(out, tuple), list(inside.returned)
            return (*(out if several else (out,)), *inside.returned.values())

        out = self._function(computed, *args, *given)
        own = len(out) - len(keys)
        exchange.returned.update(zip(keys, out[own:], strict=True))
        return out[:own] if several else out[0]


def _without_records(frame: Frame) -> Frame:
    """Copy a frame with a trace and losses of its own, which are discarded."""
    context: CallContext = copy.copy(frame.context)
    context.trace, context.losses = context.trace.blank(), {}
    block = replace(frame.block, attention=[], mlp=[], saved={}, mlp_rows=None)
    return frame._replace(context=context, block=block)
