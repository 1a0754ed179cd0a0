"""Declarations of the models that methods can be attached to, one for each family.

This is the only room that knows the attribute names of other people's models; docs/adapters.md shows how to add one.
"""

from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products, Stack
from tokdyn.adapters.registry import (
    ADAPTERS,
    adapter_for,
    declared_adapter,
    known_adapters,
    register_adapter,
)
from tokdyn.adapters.width import Cut, SlicedLayer, Width

__all__ = [
    "ADAPTERS",
    "Arguments",
    "Blocks",
    "Cut",
    "Follow",
    "ModelAdapter",
    "Products",
    "SlicedLayer",
    "Stack",
    "Width",
    "adapter_for",
    "declared_adapter",
    "known_adapters",
    "register_adapter",
]
