"""The names of this package's methods. They can be looked up before the code of the methods, and torch, is loaded.

Methods that others register (`tokdyn.register_method`) are known to `tokdyn.methods.registry` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
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

EARLIER_SETTINGS: dict[str, tuple[str, ...]] = {"FeatureCache": ("extrapolate",)}
"""Earlier names of settings, by the name of the class, which files may still have."""


def full_name(name: Any, known: Mapping[str, tuple[str, ...]] = ALIASES) -> Any:
    """Return the class name of the method with this name or alias; return a value that names no method unchanged.

    Aliases match exactly. Class names match in any case, and with any dashes and underscores: `TokenMerge`,
    `token-merge` and `token_merge` are the same.

    Args:
        name: the name, or any other value.
        known: the methods to look among, as in `ALIASES`.
    """
    if not isinstance(name, str):
        return name
    plain = name.replace("-", "").replace("_", "").lower()
    return next((full for full, others in known.items() if name in others or plain == full.lower()), name)


def short_name(name: Any, known: Mapping[str, tuple[str, ...]] = ALIASES) -> Any:
    """Return the first alias of the method with this name or alias, or its class name if it has no alias.

    Command lines and recipes use this form. A value that names no method is returned unchanged; arguments as for
    `full_name`.
    """
    full = full_name(name, known)
    return (known[full] or (full,))[0] if isinstance(full, str) and full in known else name
