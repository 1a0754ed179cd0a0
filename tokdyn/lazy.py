"""Define values that are computed at their first use."""

from __future__ import annotations

from collections.abc import Callable
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
