"""A value that is read when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Once(Generic[Value]):
    """It is read at most once, also for all who share this object, and not after `close`."""

    def __init__(self, read: Callable[[], Value]) -> None:
        self._read: Callable[[], Value] | None = read
        self._found: list[Value] = []

    @property
    def value(self) -> Value:
        """The value."""
        if not self._found:
            assert self._read is not None, "closed before anything was read"
            self._found.append(self._read())
        return self._found[0]

    @property
    def known(self) -> bool:
        """Whether there is one already."""
        return bool(self._found)

    def put(self, value: Value) -> None:
        """The value, unless there is one."""
        if not self._found:
            self._found.append(value)

    def close(self) -> None:
        """Nothing will be read any more, and what it would be read from is let go."""
        self._read = None
