"""One object at a time: a subclass that overrides `__call__` is put in the place of an object's class, and taken away.

The object stays what it is for isinstance, its state dict, its configuration, hooks and pipelines; other objects of its
class are not touched, and a deep copy computes with its own weights. docs/design.md says what else was tried.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import nn

Call = Callable[..., Any]
_CLASSES: dict[tuple[type, Call], type] = {}
_LOCAL = threading.local()


def current() -> Any:
    """The run that this thread is in, or None."""
    return getattr(_LOCAL, "run", None)


def enter(run: Any) -> Any:
    """Make a run the current one; returns the one before, to be put back."""
    before = current()
    _LOCAL.run = run
    return before


def attach(module: nn.Module, call: Call) -> None:
    """Let calls of this one module go through `call(module, plain, args, kwargs)`, where `plain` is the call as it was.

    Attaching twice is a bug.
    """
    base = type(module)
    assert not hasattr(base, "_tokdyn_base"), f"{base.__name__} is attached already"
    key = (base, call)
    if key not in _CLASSES:
        _CLASSES[key] = _subclass(base, call)
    module.__class__ = _CLASSES[key]


def detach(module: nn.Module) -> None:
    """Give a module its own class back."""
    base = getattr(type(module), "_tokdyn_base", None)
    if base is not None:
        module.__class__ = base


def base_class(module: nn.Module) -> type:
    """The class that a module had before it was attached."""
    base: type = getattr(type(module), "_tokdyn_base", type(module))
    return base


def _subclass(base: type, call: Call) -> type:
    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(self, base.__call__, args, kwargs)

    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        return _new, (base, call), self.__dict__

    names = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_tokdyn_base": base,
    }
    return type(base.__name__, (base,), names)


def _new(base: type, call: Call) -> Any:
    """An object for copy and pickle to fill; both find classes by name, and this one has the name of its base."""
    key = (base, call)
    if key not in _CLASSES:
        _CLASSES[key] = _subclass(base, call)
    made: Any = _CLASSES[key]
    return made.__new__(made)
