"""A method as JSON, YAML and the command line write it: its name under `method`, its settings beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokdyn.errors import InputError
from tokdyn.methods.base import Method


def written(method: Method) -> dict[str, Any]:
    """What `from_written` reads: the name of the method and all of its settings, ready for JSON."""
    return {"method": type(method).__name__, **method.model_dump(mode="json")}


def from_written(settings: Any) -> Method:
    """A method from what was written of it.

    Args:
        settings: a mapping such as {"method": "TokenMerge", "ratio": 0.3}; lists stand for tuples.

    Raises:
        InputError: it names no method, or a setting does not fit.
    """
    from tokdyn.methods import METHODS

    name = settings.get("method") if isinstance(settings, Mapping) else None
    if name not in METHODS:
        raise InputError(f"there is no method {name!r}; this version knows {', '.join(METHODS)}.")
    return METHODS[name](**{str(key): _frozen(value) for key, value in settings.items() if key != "method"})


def _frozen(value: Any) -> Any:
    """Lists as the tuples that methods have."""
    return tuple(_frozen(each) for each in value) if isinstance(value, list) else value
