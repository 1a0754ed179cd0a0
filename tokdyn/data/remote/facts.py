"""Describe what a store says of a remote file, or why it does not."""

from __future__ import annotations

from dataclasses import dataclass


class FinalError(Exception):
    """Raised for what another try does not change. Its text goes on after the address."""


@dataclass(frozen=True)
class Facts:
    """What a store says of a file.

    Attributes:
        size: in bytes.
        version: changes with the content; "" if the store does not say.
    """

    size: int
    version: str
