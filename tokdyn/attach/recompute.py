"""Blocks that are recomputed in the backward pass, by gradient checkpointing.

Two ways lead there. Models of diffusers hold the function that checkpoints, and for one call it is bound to the call's
context (`bind`): brackets and gates act outside of what is recomputed, so that nothing is drawn, decided or counted
twice. Other models call `torch.utils.checkpoint` in their forward (timm, forks of the public DiT): then a block is
called again when its call is long over, with the tensor that it got the first time, and that tensor leads back to the
context as it was then (`Replays`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from tokdyn.attach import class_swap
from tokdyn.attach.context import CallContext, Readings
from tokdyn.attach.engine import call_block
from tokdyn.attach.handlers.base import Exchange, Frame
from tokdyn.attach.sites import Site
from tokdyn.attach.view import FollowedArguments
from tokdyn.errors import InputError

_FUNCTION = "_gradient_checkpointing_func"
_TOKENS = object()  # stands for the tokens that lead back to a frame, which must not hold them
_NEXT = 0  # in the place of the id of a block: whichever comes next
_REPLAYS: WeakKeyDictionary[nn.Module, ReferenceType[Replays]] = WeakKeyDictionary()
_HIDDEN: WeakSet[nn.Module] = WeakSet()  # blocks that ran without gradients in a call that wants them


class Replays:
    """Frames of a model's block calls, by the tokens that the blocks got, as long as these are kept."""

    def __init__(self) -> None:
        self._frames: Any = WeakTensorKeyDictionary()

    def __len__(self) -> int:
        return len(self._frames)

    def __reduce__(self) -> Any:
        return Replays, ()

    def remember(self, frame: Frame, module: nn.Module, site: Site, named: dict[str, Any]) -> None:
        """Make a way back to the frame of a block that is about to be called."""
        if torch.compiler.is_compiling():
            return
        if not torch.is_grad_enabled():
            _HIDDEN.add(module)
            return
        tokens = named[site.blocks.tokens]
        _REPLAYS[module] = ref(self)
        self._frames.setdefault(tokens, {})[id(module)] = _detached(frame, tokens, _TOKENS)

    def find(self, module: nn.Module, value: Any) -> Frame | None:
        """Find the frame that an argument of a block leads back to."""
        frames = self._frames.get(value) if isinstance(value, Tensor) else None
        frame: Frame | None = frames and (frames.get(id(module)) or frames.get(_NEXT))
        return None if frame is None else _detached(frame, _TOKENS, value)

    def go_on(self, frame: Frame, site: Site, out: Any) -> None:
        """After a block was recomputed, let the next one, if it is too, go on in the same frame."""
        tokens = out[site.blocks.returns.index("tokens")] if isinstance(out, tuple) else out
        self._frames.setdefault(tokens, {})[_NEXT] = _detached(frame, tokens, _TOKENS)


def call_outside(module: nn.Module, plain: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a module of a wrapped model outside of every call of the model: recompute it, or call it as it was.

    Raises:
        InputError: the checkpointing hides the tensors that lead back.
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
            "gradient checkpointing with use_reentrant=True recomputes blocks outside of the call of a wrapped model; "
            "use use_reentrant=False."
        )
    return plain(module, *args, **kwargs)


def _detached(frame: Frame, old: Any, new: Any) -> Frame:
    """Copy a frame so that blocks can run in it without an effect on its call, with one object in place of another."""
    context = copy.copy(frame.context)
    context.trace, context.losses, context.arguments, context.guard = context.trace.blank(), {}, {}, None
    context.readings = Readings(
        context.readings.grid, context.readings.levels, context.readings.position, FollowedArguments()
    )
    context.slots = [_replaced(state, old, new) for state in context.slots]
    return replace(frame, context=context, remember=None)


def _replaced(state: Any, old: Any, new: Any) -> Any:
    """Copy the state of a handler with one object in place of another."""
    if not is_dataclass(state) or isinstance(state, type):
        return new if state is old else state
    changed = {field.name: new for field in fields(state) if getattr(state, field.name) is old}
    return replace(state, **changed) if changed else copy.copy(state)


def bind(model: nn.Module, frame: Frame) -> list[tuple[nn.Module, Any]]:
    """Bind the checkpointing of a model to one call; returns what `release` needs."""
    bound = []
    for module in model.modules():
        function = module.__dict__.get(_FUNCTION)
        if function is not None:
            bound.append((module, function))
            module.__dict__[_FUNCTION] = _checkpointing(function, frame)
    return bound


def release(bound: list[tuple[nn.Module, Any]]) -> None:
    """Put back what `bind` replaced."""
    for module, function in bound:
        module.__dict__[_FUNCTION] = function


def _checkpointing(function: Any, frame: Frame) -> Any:
    """Let checkpointing go on inside of what the engine does around a block."""

    def checkpoint(module: nn.Module, *args: Any) -> Any:
        site = frame.sites.get(id(module))
        if site is None:
            return function(module, *args)
        return call_block(replace(frame, remember=None), module, site, _Checkpointed(function, module, frame), args, {})

    return checkpoint


class _Checkpointed:
    """The innermost call of a block, recomputed in the frame that it was computed in."""

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
            here = replace(frame, exchange=inside)
            if runs:  # what is recomputed is noted nowhere
                here = replace(_apart(here), exchange=inside)
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


def _apart(frame: Frame) -> Frame:
    """Copy a frame so that what is noted in it goes nowhere."""
    context: CallContext = copy.copy(frame.context)
    context.trace, context.losses = context.trace.blank(), {}
    block = replace(frame.block, attention=[], mlp=[], saved={}, mlp_rows=None)
    return replace(frame, context=context, block=block)
