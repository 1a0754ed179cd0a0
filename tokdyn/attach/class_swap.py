"""Swap the class of one object for a subclass that overrides `__call__`, and swap it back.

The object stays what it is for isinstance, its state dict, its configuration, hooks and pipelines; other objects of its
class are not touched, and a deep copy computes with its own weights. docs/design.md says what else was tried.
"""

from __future__ import annotations

import functools
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
    """The frame that this thread is in, None outside of calls of wrapped models."""
    return _LOCAL.frame


def enter(frame: Any) -> Any:
    """Put this thread into a frame; returns the frame before, to be put back."""
    before = current()
    _LOCAL.frame = frame
    return before


def within(frame: Any, call: Call, *args: Any, **kwargs: Any) -> Any:
    """Call something with this thread in a frame."""
    before = enter(frame)
    try:
        return call(*args, **kwargs)
    finally:
        enter(before)


def attach(
    module: nn.Module,
    call: Call,
    overrides: Mapping[str, Call] | None = None,
    *,
    prepare: Call | None = None,
    conclude: Call | None = None,
    outside: Call | None = None,
) -> None:
    """Let calls of this one module go through `call(module, plain, args, kwargs)`, where `plain` is its call as it was.

    Args:
        module: attaching twice is a bug.
        call: a function of a module. With `outside` it is for calls in a frame and gets that first.
        overrides: methods that the object gets, by name; each is called with the object and the method that it hides
            (or None) before its arguments.
        prepare: `prepare(module, args, kwargs)` is called first, and `call` gets its result as one more argument. It is
            no part of the graphs that torch.compile makes; in the middle of a larger graph the result is None.
        conclude: `conclude(module, output)` is called last, outside of graphs too; comes with `prepare`.
        outside: takes the place of `call` where this thread is in no frame.
    """
    base = type(module)
    assert not hasattr(base, "_tokdyn_base"), f"{base.__name__} is attached already"
    module.__class__ = _class_for(base, call, tuple((overrides or {}).items()), prepare, conclude, outside)


def is_attached(module: nn.Module) -> bool:
    """Whether calls of this module go through something."""
    return hasattr(type(module), "_tokdyn_base")


def attach_like(module: nn.Module, other: nn.Module) -> None:
    """Let calls of a module go through what those of another go through, unless they do already."""
    if not is_attached(module):
        call, outside = vars(type(other))["_tokdyn_call"]
        attach(module, call, outside=outside)


def detach(module: nn.Module) -> None:
    """Give a module its own class back."""
    base = getattr(type(module), "_tokdyn_base", None)
    if base is not None:
        module.__class__ = base


def base_class(module: nn.Module) -> type:
    """The class that a module had before it was attached."""
    base: type = getattr(type(module), "_tokdyn_base", type(module))
    return base


def _class_for(base: type, *parts: Any) -> type:
    """The subclass of a class with these parts, made once."""
    key = (base, *parts)
    if key not in _CLASSES:
        _CLASSES[key] = _subclass(base, *parts)
    return _CLASSES[key]


def _subclass(
    base: type,
    call: Call,
    overrides: tuple[tuple[str, Call], ...],
    prepare: Call | None,
    conclude: Call | None,
    outside: Call | None,
) -> type:
    plain = base.__call__  # found here: torch.compile does not look into some classes
    if outside is not None:
        __call__ = _calling_in_frames(plain, call, outside)
    else:
        __call__ = _calling(plain, call) if prepare is None else _calling_prepared(plain, call, prepare, conclude)

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
        names[name] = _hiding(method, getattr(base, name, None))
    return type(base.__name__, (base,), names)


def _calling(plain: Call, call: Call) -> Call:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(self, plain, args, kwargs)

    return __call__


def _calling_in_frames(plain: Call, call: Call, outside: Call) -> Call:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        frame = _LOCAL.frame
        return outside(self, plain, args, kwargs) if frame is None else call(frame, self, plain, args, kwargs)

    return __call__


def _calling_prepared(plain: Call, call: Call, prepare: Call, conclude: Call | None) -> Call:
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


def _hiding(method: Call, hidden: Call | None) -> Call:
    def bound(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return method(self, hidden, *args, **kwargs)

    return bound if hidden is None else functools.wraps(hidden)(bound)


def _new(base: type, *parts: Any) -> Any:
    """An object for copy and pickle to fill; both find classes by name, and this one has the name of its base."""
    made: Any = _class_for(base, *parts)
    return made.__new__(made)
