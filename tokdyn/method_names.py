"""The names of this package's methods. They can be looked up before the code of the methods, and torch, is loaded.

Methods that others register (`tokdyn.register_method`) are known to `tokdyn.methods.registry` alone.
"""

from __future__ import annotations

from typing import Any

ALIASES: dict[str, tuple[str, ...]] = {
    "Chunking": ("dc",),
    "TokenMerge": ("merge", "tome"),
    "TokenDrop": ("tread",),
    "DepthSkip": ("skip",),
    "DynamicWidth": ("dydit", "width"),
    "FeatureCache": ("cache", "teacache"),
}
"""The other names of each method by the name of its class, in the order of tables."""


def full_name(name: Any) -> Any:
    """Return the class name of the method with this name or alias; return a value that names no method unchanged.

    Aliases match exactly. Class names match in any case, and with any dashes and underscores.
    """
    if not isinstance(name, str):
        return name
    plain = name.replace("-", "").replace("_", "").lower()
    return next((full for full, others in ALIASES.items() if name in others or plain == full.lower()), name)


def short_name(name: Any) -> Any:
    """Return the first alias of the method with this name or alias; return a value that names no method unchanged."""
    full = full_name(name)
    return ALIASES[full][0] if isinstance(full, str) and full in ALIASES else name
