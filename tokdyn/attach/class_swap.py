"""One object at a time: a subclass that overrides `__call__` is put in the place of an object's class, and taken away.

The object stays what it is for isinstance, its state dict, its configuration, hooks and pipelines; other objects of its
class are not touched, and a deep copy computes with its own weights. docs/design.md says what else was tried.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Call = Callable[..., Any]
_CLASSES: dict[tuple[Any, ...], type] = {}


class _Local(threading.local):
    def __init__(self) -> None:  # in every thread, so that compiled code need not ask whether it is there
        self.run: Any = None


_LOCAL = _Local()


def current() -> Any:
    """The run that this thread is in, or None."""
    return _LOCAL.run


def enter(run: Any) -> Any:
    """Make a run the current one; returns the one before, to be put back."""
    before = current()
    _LOCAL.run = run
    return before


def attach(module: nn.Module, call: Call, *methods: Call, before: Call | None = None) -> None:
    """Let calls of this one module go through `call(module, plain, args, kwargs)`, where `plain` is the call as it was.

    Args:
        module: attaching twice is a bug.
        call: a function of a module.
        methods: more functions that the object gets, under their names; each is given the function it hides, or None,
            after the object itself.
        before: `before(module, args, kwargs)` is called first, and `call` gets its result as one more argument. It is
            not part of what torch.compile makes a graph of: the graph takes the result as a constant, and another one
            makes another graph. In the middle of a larger graph there is no before, and the result is None.
    """
    base = type(module)
    assert not hasattr(base, "_tokdyn_base"), f"{base.__name__} is attached already"
    module.__class__ = _class_for(base, call, methods, before)


def is_attached(module: nn.Module) -> bool:
    """Whether calls of this module go through something."""
    return hasattr(type(module), "_tokdyn_base")


def attach_like(module: nn.Module, other: nn.Module) -> None:
    """Let calls of a module go through what those of another go through, unless they do already."""
    if not is_attached(module):
        attach(module, vars(type(other))["_tokdyn_call"].__func__)


def detach(module: nn.Module) -> None:
    """Give a module its own class back."""
    base = getattr(type(module), "_tokdyn_base", None)
    if base is not None:
        module.__class__ = base


def base_class(module: nn.Module) -> type:
    """The class that a module had before it was attached."""
    base: type = getattr(type(module), "_tokdyn_base", type(module))
    return base


def _class_for(base: type, call: Call, methods: tuple[Call, ...], before: Call | None) -> type:
    key = (base, call, methods, before)
    if key not in _CLASSES:
        _CLASSES[key] = _subclass(base, call, methods, before)
    return _CLASSES[key]


def _subclass(base: type, call: Call, methods: tuple[Call, ...], before: Call | None) -> type:
    plain = base.__call__  # found here: torch.compile does not look into some classes
    __call__ = _calling(plain, call) if before is None else _calling_after(plain, call, before)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        return _new, (base, call, methods, before), self.__dict__

    names: dict[str, Any] = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_tokdyn_base": base,
        "_tokdyn_call": staticmethod(call),
    }
    for method in methods:
        names[method.__name__] = _hiding(method, getattr(base, method.__name__, None))
    return type(base.__name__, (base,), names)


def _calling(plain: Call, call: Call) -> Call:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(self, plain, args, kwargs)

    return __call__


def _calling_after(plain: Call, call: Call, before: Call) -> Call:
    from torch._dynamo.eval_frame import skip_code

    apart: Call = torch.compiler.disable(before)  # type: ignore[no-untyped-call]

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        ahead = None if torch.compiler.is_compiling() else apart(self, args, kwargs)
        return call(self, plain, args, kwargs, ahead)

    skip_code(__call__.__code__)  # the graph begins with `call`
    return __call__


def _hiding(method: Call, hidden: Call | None) -> Call:
    def bound(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return method(self, hidden, *args, **kwargs)

    return bound if hidden is None else functools.wraps(hidden)(bound)


def _new(base: type, call: Call, methods: tuple[Call, ...], before: Call | None) -> Any:
    """An object for copy and pickle to fill; both find classes by name, and this one has the name of its base."""
    made: Any = _class_for(base, call, methods, before)
    return made.__new__(made)
