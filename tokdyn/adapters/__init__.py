"""Adapters: declarations of the models that methods can be attached to, one for each family.

Only this package knows the attribute names of other people's models. docs/adapters.md shows how to add an adapter.
"""

from tokdyn.adapters.arrangement import Arrangement, without_batch
from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter
from tokdyn.adapters.products import CrossAttention, Experts, Products
from tokdyn.adapters.registry import (
    ADAPTERS,
    adapter_for,
    declared_adapter,
    known_adapters,
    register_adapter,
)
from tokdyn.adapters.width import SlicedLayer, Width
from tokdyn.tokens import ImageTokens

__all__ = [
    "ADAPTERS",
    "Arguments",
    "Arrangement",
    "Blocks",
    "CrossAttention",
    "Experts",
    "Follow",
    "ImageTokens",
    "ModelAdapter",
    "Products",
    "SlicedLayer",
    "Width",
    "adapter_for",
    "declared_adapter",
    "known_adapters",
    "register_adapter",
    "without_batch",
]
