"""The methods by name: one name and one list of aliases for each, wherever a method is written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from tokdyn.errors import InputError
from tokdyn.methods.base import Method

METHODS: dict[str, type[Method]] = {}
"""Every method by the name of its class."""
Kind = TypeVar("Kind", bound=type[Method])


def register_method(method: Kind) -> Kind:
    """Let files, the command line and tables know a method; a decorator of its class.

    Its handlers are registered with `tokdyn.attach.handles`; docs/methods/adding.md shows both.

    Returns:
        The class.

    Raises:
        InputError: it is no method, or another method has its name or one of its aliases.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise InputError(f"register_method got {method!r}, expected a subclass of tokdyn.methods.Method.")
    for name in (method.__name__, *method.aliases):
        other = find_method(name)
        if other is not None and other is not method:
            raise InputError(f"there is a method called {name!r} already, {other.__name__}; choose another name.")
    METHODS[method.__name__] = method
    return method


def find_method(name: str) -> type[Method] | None:
    """Find a method by one of its aliases, or by its name in any spelling of case, with dashes or underscores."""
    plain = name.replace("-", "").replace("_", "").lower()
    return next((each for each in METHODS.values() if name in each.aliases or plain == each.__name__.lower()), None)


def full_name(name: Any) -> Any:
    """Turn any name of a method into the name of its class; what names no method stays as it is."""
    method = find_method(name) if isinstance(name, str) else None
    return name if method is None else method.__name__


def short_name(name: Any) -> Any:
    """Turn any name of a method into its first alias, which command lines and recipes use."""
    method = find_method(name) if isinstance(name, str) else None
    return name if method is None else method.aliases[0] if method.aliases else method.__name__


def to_settings(method: Method) -> dict[str, Any]:
    """Write a method as `from_settings` reads it: its name under "method", its settings beside it, ready for JSON."""
    return {"method": type(method).__name__, **method.model_dump(mode="json")}


def from_settings(settings: Any) -> Method:
    """Make a method from what JSON, YAML or the command line hold of it.

    Args:
        settings: a mapping such as {"method": "TokenMerge", "ratio": 0.3}; lists stand for tuples.

    Raises:
        InputError: it names no method, or a setting does not fit.
    """
    name = settings.get("method") if isinstance(settings, Mapping) else None
    method = find_method(name) if isinstance(name, str) else None
    if method is None:
        raise InputError(f"there is no method {name!r}; this version knows {', '.join(METHODS)}.")
    return method(**{str(key): _frozen(value) for key, value in settings.items() if key != "method"})


def _frozen(value: Any) -> Any:
    """Turn lists into the tuples that methods have."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
