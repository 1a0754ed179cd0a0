"""Define values that are computed, and names of packages that are loaded, at their first use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Lazy(Generic[Value]):
    """A value that is computed at the first use and then kept."""

    def __init__(self, read: Callable[[], Value]) -> None:
        self._read: Callable[[], Value] | None = read
        self._values: list[Value] = []

    @property
    def value(self) -> Value:
        """The value; computed now if it is not known yet."""
        if not self._values:
            assert self._read is not None, "closed before anything was read"
            self._values.append(self._read())
        return self._values[0]

    @property
    def known(self) -> bool:
        """Whether the value has been computed or set."""
        return bool(self._values)

    def put(self, value: Value) -> None:
        """Set the value, if it is not known yet."""
        if not self._values:
            self._values.append(value)

    def close(self) -> None:
        """Release the function that computes the value; afterwards, a value that is not known may not be used."""
        self._read = None


def loading(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """Return a `__getattr__` for a package that loads its public names when they are first used (PEP 562).

    Args:
        package: name of the package, its `__name__`.
        modules: the module of each name; ".name" is one of the package.
    """

    def load(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value: object = getattr(importlib.import_module(modules[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return load
