"""Faster forms of the functions of `tokdyn.ops` for the CPU, registered with `tokdyn.ops.dispatch` when imported.

They exist so that tests, demos and small studies are quick. Nothing but `tokdyn.ops` imports this package, and nothing
depends on it: within `tokdyn.ops.plain()`, or without it, every function computes the same, up to rounding.
"""

from tokdyn.ops.cpu import attention, dechunk, layers, linear

__all__ = ["attention", "dechunk", "layers", "linear"]
