"""What is known of the models that methods can be attached to: one declaration for each family."""

from tokdyn.adapters.base import Arguments, Follow, ModelAdapter, Stack
from tokdyn.adapters.registry import (
    ADAPTERS,
    adapter_for,
    declared_adapter,
    known_adapters,
    register_adapter,
)
from tokdyn.adapters.width import Cut, Width

__all__ = [
    "ADAPTERS",
    "Arguments",
    "Cut",
    "Follow",
    "ModelAdapter",
    "Stack",
    "Width",
    "adapter_for",
    "declared_adapter",
    "known_adapters",
    "register_adapter",
]
