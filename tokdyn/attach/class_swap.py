"""Swap the class of one object for a subclass that overrides `__call__`, and swap it back.

isinstance checks, state dict, configuration, hooks and pipelines see the same object as before. Other objects of its
class are not touched. A deep copy is attached too, and computes with its own weights. docs/design.md says what else was
tried.

While a model is called, its thread holds a frame (`tokdyn.attach.handlers.base.Frame`): which call of the model this
is and, inside of a block, which samples and tokens the block computes. A thread has one frame or none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Call = Callable[..., Any]
_CLASSES: dict[tuple[Any, ...], type] = {}


class _Local(threading.local):
    def __init__(self) -> None:  # in every thread, so that compiled code need not ask whether it is there
        self.frame: Any = None


_LOCAL = _Local()


def current() -> Any:
    """Return the frame of this thread; None outside of calls of wrapped models."""
    return _LOCAL.frame


def enter(frame: Any) -> Any:
    """Make `frame` the frame of this thread; return the previous one, which the caller has to enter again."""
    before = current()
    _LOCAL.frame = frame
    return before


def within(frame: Any, call: Call, *args: Any, **kwargs: Any) -> Any:
    """Return `call(*args, **kwargs)`, computed in a frame (None: in no frame); then restore the previous one."""
    before = enter(frame)
    try:
        return call(*args, **kwargs)
    finally:
        enter(before)


def attach(
    module: Any,
    call: Call,
    overrides: Mapping[str, Call] | None = None,
    *,
    prepare: Call | None = None,
    conclude: Call | None = None,
    outside: Call | None = None,
) -> None:
    """Replace calls of this one module, or pipeline, by `call(module, plain, args, kwargs)`.

    `plain` is the `__call__` of the module's own class, so `plain(module, *args, **kwargs)` is the original call. All
    functions must be defined at the top level of a file, because copies and pickles refer to them by name.

    Args:
        module: asserted not to be attached already.
        call: the replacement. If `outside` is given, it is used in frames only, as `call(frame, module, plain, args,
            kwargs)`.
        overrides: methods that the object gets, by name. Each is called as `method(module, original, *args, **kwargs)`,
            where `original` is the function of the same name in the module's own class, or None.
        prepare: `prepare(module, args, kwargs)` runs first, and its result becomes a fifth argument of `call`.
            torch.compile never traces it: it runs before the graph. When the module is part of a larger graph it does
            not run, and `call` gets None. Not to be combined with `outside`.
        conclude: `conclude(module, output)` runs last, under the same conditions as `prepare`, which it needs. What it
            returns is ignored.
        outside: `outside(module, plain, args, kwargs)` replaces the calls that are made in no frame.
    """
    base = type(module)
    assert not hasattr(base, "_tokdyn_base"), f"{base.__name__} is attached already"
    module.__class__ = _class_for(base, call, tuple((overrides or {}).items()), prepare, conclude, outside)


def is_attached(module: object) -> bool:
    """Return whether `attach` is in effect on this module."""
    return hasattr(type(module), "_tokdyn_base")


def attach_like(module: nn.Module, other: nn.Module) -> None:
    """Attach a module with the `call` and `outside` of another, attached one. An attached module stays as it is."""
    if not is_attached(module):
        call, outside = vars(type(other))["_tokdyn_call"]
        attach(module, call, outside=outside)


def detach(module: Any) -> None:
    """Give a module its own class back. A module that is not attached stays as it is."""
    base = getattr(type(module), "_tokdyn_base", None)
    if base is not None:
        module.__class__ = base


def base_class(module: nn.Module) -> type:
    """Return a module's own class: the one before `attach` if it is attached."""
    base: type = getattr(type(module), "_tokdyn_base", type(module))
    return base


def _class_for(base: type, *functions: Any) -> type:
    """Return the subclass that `_subclass` builds of a class and functions, built once for each combination."""
    key = (base, *functions)
    if key not in _CLASSES:
        _CLASSES[key] = _subclass(base, *functions)
    return _CLASSES[key]


def _subclass(
    base: type,
    call: Call,
    overrides: tuple[tuple[str, Call], ...],
    prepare: Call | None,
    conclude: Call | None,
    outside: Call | None,
) -> type:
    """Build a subclass that calls these functions; see `attach` for them."""
    plain = base.__call__  # looked up here, because torch.compile cannot trace the lookup in some classes
    if outside is not None:
        __call__ = _call_by_frame(plain, call, outside)
    else:
        __call__ = _replaced_call(plain, call) if prepare is None else _prepared_call(plain, call, prepare, conclude)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        return _new, (base, call, overrides, prepare, conclude, outside), self.__dict__

    names: dict[str, Any] = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_tokdyn_base": base,
        "_tokdyn_call": (call, outside),
    }
    for name, method in overrides:
        names[name] = _override(method, getattr(base, name, None))
    kind = _kind_like(base) if overrides else type(base)
    return kind(base.__name__, (base,), names)


def _kind_like(base: type) -> Any:
    """Return a metaclass whose classes equal a base class, because `from_pipe` of diffusers compares classes.

    Their hashes differ: a table of classes, such as FSDP's, must not take the subclass for the base or the other way.
    """

    def __eq__(cls: type, other: object) -> bool:
        return other is cls or other is base

    return type(type(base).__name__, (type(base),), {"__eq__": __eq__, "__hash__": type.__hash__})


def _replaced_call(plain: Call, call: Call) -> Call:
    """Return a `__call__` that makes every call by `call`."""

    @functools.wraps(plain)
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(self, plain, args, kwargs)

    return __call__


def _call_by_frame(plain: Call, call: Call, outside: Call) -> Call:
    """Return a `__call__` that makes calls in a frame by `call` and others by `outside`."""

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        frame = _LOCAL.frame
        return outside(self, plain, args, kwargs) if frame is None else call(frame, self, plain, args, kwargs)

    return __call__


def _prepared_call(plain: Call, call: Call, prepare: Call, conclude: Call | None) -> Call:
    """Return a `__call__` that runs `prepare` before `call` and `conclude` after it, outside of compiled graphs."""
    from torch._dynamo.eval_frame import skip_code

    first: Call = torch.compiler.disable(prepare)  # type: ignore[no-untyped-call]
    last: Call | None = None if conclude is None else torch.compiler.disable(conclude)  # type: ignore[no-untyped-call]

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        prepared = None if compiling else first(self, args, kwargs)
        out = call(self, plain, args, kwargs, prepared)
        if last is not None and not compiling:
            last(self, out)
        return out

    skip_code(__call__.__code__)  # the graph begins with `call`
    return __call__


def _override(method: Call, original: Call | None) -> Call:
    """Return a method that calls `method` with the object, the original and the arguments."""

    def bound(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return method(self, original, *args, **kwargs)

    return bound if original is None else functools.wraps(original)(bound)


def _new(base: type, *functions: Any) -> Any:
    """Create an empty object of the subclass, for copy and pickle to fill.

    By themselves they would look the class up by name, and the subclass has the name of its base.
    """
    subclass: Any = _class_for(base, *functions)
    return subclass.__new__(subclass)


def enter_in_table_of_caches(block: nn.Module) -> None:
    """Let the caches of diffusers find what they know of a block's own class under its present one.

    They look it up in a table of classes. Where there is no such table, or no entry, nothing is done.
    """
    table = getattr(sys.modules.get("diffusers.hooks._helpers"), "TransformerBlockRegistry", None)
    if table is None or not is_attached(block):
        return
    with contextlib.suppress(ValueError):  # diffusers has no caches for this class
        table.register(type(block), dataclasses.replace(table.get(base_class(block))))


def compiled_call(frame: Any, module: nn.Module, site: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that calls a block: another one than `call` if torch.compile compiles the block by itself.

    A block in which the handlers do other things from call to call runs as it is, without its compiled code.

    Args:
        frame: the call of the model.
        module: the block.
        site: the site of the block.
        call: the original call of the block.
    """
    if vars(module).get("_compiled_call_impl") is None or torch.compiler.is_compiling():
        return call
    sublayers = frame.handlers.sublayers
    if frame.handlers.kernels or not all(handler.steady(frame.context) for handler in sublayers):
        kind: Any = base_class(module)
        return functools.partial(kind._call_impl, module) if kind.__call__ is nn.Module.__call__ else call
    return functools.partial(_call_compiled, module, site, call) if sublayers else call


def _call_compiled(module: nn.Module, site: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a compiled block such that equal blocks share one graph.

    A graph serves another block if all that was read while it was made is the same there. So the sublayers find their
    sites in themselves and not by their ids, the sites have the number of a block that the handlers treat alike, and
    what the trace has of earlier blocks is put aside.
    """
    frame = current()
    numbers = {handler.alike(frame.context, site.block) for handler in frame.handlers.sublayers}
    number = numbers.pop() if len(numbers) == 1 else site.block
    found = [(vars(part), frame.sites[id(part)]) for part in module.modules() if id(part) in frame.sites]
    inside = [(held, place) for held, place in found if place.kind in ("attention", "mlp")]
    context = frame.context
    whole, context.trace = context.trace, context.trace.blank()
    for held, place in inside:
        held["_tokdyn_site"] = dataclasses.replace(place, block=number)
    try:
        return call(*args, **kwargs)
    finally:
        for held, _ in inside:
            held.pop("_tokdyn_site", None)
        whole.absorb(context.trace)
        context.trace = whole
