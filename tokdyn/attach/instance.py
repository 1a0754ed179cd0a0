"""One object at a time: a subclass that overrides `__call__` is put in the place of an object's class, and taken away.

The object stays what it is for isinstance, its state dict, its configuration, hooks and pipelines; other objects of its
class are not touched, and a deep copy computes with its own weights. docs/design.md says what else was tried.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from torch import nn

Call = Callable[..., Any]
_CLASSES: dict[tuple[Any, ...], type] = {}
_LOCAL = threading.local()


def current() -> Any:
    """The run that this thread is in, or None."""
    return getattr(_LOCAL, "run", None)


def enter(run: Any) -> Any:
    """Make a run the current one; returns the one before, to be put back."""
    before = current()
    _LOCAL.run = run
    return before


def attach(module: nn.Module, call: Call, *methods: Call) -> None:
    """Let calls of this one module go through `call(module, plain, args, kwargs)`, where `plain` is the call as it was.

    Args:
        module: attaching twice is a bug.
        call: a function of a module.
        methods: more functions that the object gets, under their names; each is given the function it hides, or None,
            after the object itself.
    """
    base = type(module)
    assert not hasattr(base, "_tokdyn_base"), f"{base.__name__} is attached already"
    module.__class__ = _class_for(base, call, *methods)


def detach(module: nn.Module) -> None:
    """Give a module its own class back."""
    base = getattr(type(module), "_tokdyn_base", None)
    if base is not None:
        module.__class__ = base


def base_class(module: nn.Module) -> type:
    """The class that a module had before it was attached."""
    base: type = getattr(type(module), "_tokdyn_base", type(module))
    return base


def _class_for(base: type, call: Call, *methods: Call) -> type:
    key = (base, call, *methods)
    if key not in _CLASSES:
        _CLASSES[key] = _subclass(base, call, *methods)
    return _CLASSES[key]


def _subclass(base: type, call: Call, *methods: Call) -> type:
    plain = base.__call__  # found here: torch.compile does not look into some classes

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(self, plain, args, kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        return _new, (base, call, *methods), self.__dict__

    names: dict[str, Any] = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_tokdyn_base": base,
    }
    for method in methods:
        names[method.__name__] = _hiding(method, getattr(base, method.__name__, None))
    return type(base.__name__, (base,), names)


def _hiding(method: Call, hidden: Call | None) -> Call:
    def bound(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return method(self, hidden, *args, **kwargs)

    return bound if hidden is None else functools.wraps(hidden)(bound)


def _new(base: type, call: Call, *methods: Call) -> Any:
    """An object for copy and pickle to fill; both find classes by name, and this one has the name of its base."""
    made: Any = _class_for(base, call, *methods)
    return made.__new__(made)
