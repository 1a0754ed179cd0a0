"""Look up methods by name, and turn them into settings for files and back.

Python, files, the command line and tables all accept the same names: that of the class, and its aliases.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from tokdyn import method_names
from tokdyn.errors import InputError
from tokdyn.methods.base import Method
from tokdyn.reading import shown

METHODS: dict[str, type[Method]] = {}
"""The registered methods by the name of their class, in the order in which tables list them."""
Kind = TypeVar("Kind", bound=type[Method])


def register_method(method: Kind) -> Kind:
    """Register a method, so that files, the command line and tables accept its name and aliases; a class decorator.

    The function that builds the method's handlers is registered separately, with `tokdyn.attach.handles`;
    docs/methods/adding.md shows both. Registering a class again changes nothing.

    Args:
        method: the class of the method.

    Returns:
        The same class.

    Raises:
        InputError: the argument is not a subclass of Method, or another method has its name or one of its aliases.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise InputError(f"register_method got {method!r}; give it a subclass of tokdyn.methods.Method.")
    for name in (method.__name__, *method.aliases):
        other = find_method(name)
        if other is not None and other is not method:
            raise InputError(f"the name {name!r} is taken by the method {other.__name__}; choose another name.")
    METHODS[method.__name__] = method
    return method


def find_method(name: str) -> type[Method] | None:
    """Return the method with this name or alias; None if there is none."""
    return METHODS.get(full_name(name))


def full_name(name: Any) -> Any:
    """Do what `method_names.full_name` does, among all registered methods."""
    return method_names.full_name(name, _aliases())


def short_name(name: Any) -> Any:
    """Do what `method_names.short_name` does, among all registered methods."""
    return method_names.short_name(name, _aliases())


def _aliases() -> dict[str, tuple[str, ...]]:
    """Return the aliases of all registered methods by the name of their class."""
    return {name: method.aliases for name, method in METHODS.items()}


def to_settings(method: Method) -> dict[str, Any]:
    """Return a JSON-ready dictionary for `from_settings`: the class name under "method", and all settings by name."""
    return {"method": type(method).__name__, **method.model_dump(mode="json")}


def from_settings(settings: Any) -> Method:
    """Build a method from settings that were read from JSON, YAML or the command line.

    Args:
        settings: a mapping such as {"method": "TokenMerge", "ratio": 0.3}, with any name or alias of the method. Lists
            are turned into tuples, and settings that are missing have their defaults.

    Raises:
        InputError: "method" is missing or is not the name of a registered method, or a setting is unknown or wrong.
    """
    name = settings.get("method") if isinstance(settings, Mapping) else None
    method = find_method(name) if isinstance(name, str) else None
    if method is None:
        raise InputError(f"there is no method {shown(name)}; known methods are {', '.join(METHODS)}.")
    return method(**{str(key): _as_tuples(value) for key, value in settings.items() if key != "method"})


def _as_tuples(value: Any) -> Any:
    """Turn lists into tuples, at every level, because settings of methods are immutable."""
    return tuple(_as_tuples(item) for item in value) if isinstance(value, list) else value
