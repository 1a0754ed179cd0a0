"""List what users rely on: public names with signatures, settings with defaults, commands, keys of recipes.

    python tests/public_names.py

writes the list to tests/public_names.txt, which a test compares with the code: who changes a public name, a parameter
or a default does it on purpose, and everybody sees it in the diff.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

LIST = Path(__file__).with_suffix(".txt")


def lines() -> list[str]:
    """Everything public, one line each."""
    return [*names(), *commands(), *recipe_keys()]


def names() -> Iterator[str]:
    """The names in `__all__` of tokdyn and of its subpackages, each described where it is met first."""
    import tokdyn

    known: dict[int, str] = {}
    for package in ("tokdyn", *(f"tokdyn.{name}" for name in dir(tokdyn) if not name.startswith("_"))):
        try:
            module = importlib.import_module(package)
        except ImportError:  # a function or a class
            continue
        for name in sorted(getattr(module, "__all__", ())):
            value, path = getattr(module, name), f"{package}.{name}"
            if id(value) in known and not isinstance(value, (int, float, str, tuple)):
                yield f"{path} is {known[id(value)]}"
                continue
            known[id(value)] = path
            yield from described(path, value)


def described(path: str, value: Any) -> Iterator[str]:
    """A name and what belongs to it."""
    if inspect.isclass(value):
        yield from of_class(path, value)
    elif callable(value) and not isinstance(value, types.GenericAlias) and hasattr(value, "__module__"):
        yield f"{path}{signature(value)}" if inspect.isroutine(value) else f"{path}: {type(value).__name__}"
    elif isinstance(value, (int, float, str)) or (isinstance(value, tuple) and all(map(_plain, value))):
        yield f"{path} = {'...' if path.endswith('__version__') else repr(value)}"
    else:
        yield f"{path}: {type(value).__name__}"


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float, str))


def of_class(path: str, kind: type) -> Iterator[str]:
    """A class: what it is, its fields or parameters, and the methods that tokdyn gives it."""
    bases = ", ".join(base.__name__ for base in kind.__bases__ if base is not object)
    yield f"{path}({bases})"
    if issubclass(kind, BaseModel):
        yield from (f"{path}.{line}" for line in settings(kind))
    elif dataclasses.is_dataclass(kind):
        for field in dataclasses.fields(kind):
            made = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if made else field.default  # type: ignore[misc]
            given = "" if default is dataclasses.MISSING else f" = {shown(default)}"
            yield f"{path}.{field.name}: {field.type}{given}"
    elif issubclass(kind, tuple) and hasattr(kind, "_fields"):
        for name, annotation in inspect.get_annotations(kind).items():
            default = f" = {shown(kind._field_defaults[name])}" if name in kind._field_defaults else ""
            written = getattr(annotation, "__forward_arg__", annotation)
            yield f"{path}.{name}: {written}{default}"
    elif "__init__" in vars(kind):
        yield f"{path}.__init__{signature(kind.__init__)}"
    for name in sorted(dir(kind)):
        owner = next((each for each in kind.__mro__ if name in vars(each)), object)
        if name.startswith("_") or not owner.__module__.startswith("tokdyn"):
            continue
        value = inspect.getattr_static(kind, name)
        if isinstance(value, property):
            yield f"{path}.{name} -> {inspect.get_annotations(value.fget).get('return', '')}"  # type: ignore[arg-type]
        elif isinstance(value, (classmethod, staticmethod)):
            yield f"{path}.{name}{signature(value.__func__)}"
        elif inspect.isfunction(value):
            yield f"{path}.{name}{signature(value)}"


def settings(kind: type[BaseModel]) -> Iterator[str]:
    """The fields of settings as they are written in the code, with constraints and defaults."""
    written = {key: text for each in reversed(kind.__mro__) for key, text in inspect.get_annotations(each).items()}
    for name, info in kind.model_fields.items():
        limits = "".join(f" {each}" for each in info.metadata if type(each).__module__.startswith("annotated_types"))
        yield f"{name}: {written[name]}{limits}{default_of(info)}"


def default_of(info: FieldInfo) -> str:
    made: Any = info.default_factory  # takes no arguments in our settings
    return "" if info.is_required() else f" = {shown(made() if made else info.default)}"


def nested(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The keys of settings, those in their sections too."""
    for line, (name, info) in zip(settings(kind), kind.model_fields.items(), strict=True):
        inner = [each for each in members(info.annotation) if inspect.isclass(each) and issubclass(each, BaseModel)]
        if not inner:
            yield prefix + line
        for each in inner:
            yield from nested(each, f"{prefix}{name}.")


def members(annotation: Any) -> Iterator[Any]:
    yield annotation
    for each in typing.get_args(annotation):
        yield from members(each)


def signature(function: Any) -> str:
    """Parameters with annotations and defaults, and what is returned."""
    found = inspect.signature(function)
    parts, kind = [], None
    for each in found.parameters.values():
        if each.kind is each.KEYWORD_ONLY and kind not in (each.KEYWORD_ONLY, each.VAR_POSITIONAL):
            parts.append("*")
        star = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
        annotation = "" if each.annotation is each.empty else f": {each.annotation}"
        default = "" if each.default is each.empty else f" = {shown(each.default)}"
        parts.append(f"{star}{each.name}{annotation}{default}")
        kind = each.kind
    returned = "" if found.return_annotation is found.empty else f" -> {found.return_annotation}"
    return f"({', '.join(parts)}){returned}"


def shown(value: Any) -> str:
    """A default, in any process the same."""
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(map(repr, value)))}}}"
    return getattr(value, "__qualname__", None) or re.sub(r" object at 0x\w+", "", repr(value))


def commands() -> Iterator[str]:
    """Commands with their words, options and settings."""
    import typer
    from tokdyn.cli.main import app

    from tokdyn.recipe import Recipe

    yield from _command("tokdyn", typer.main.get_command(app), Recipe)


def _command(path: str, command: Any, recipe: type[BaseModel]) -> Iterator[str]:
    yield " ".join([path, *getattr(command, "words", ())])
    for each in command.params:
        names = "/".join([*each.opts, *each.secondary_opts])
        default = f" = {each.default!r}" if isinstance(each.default, (bool, int, float, str)) else ""
        kind = "flag" if getattr(each, "is_flag", False) else "values" if getattr(each, "multiple", False) else "value"
        yield f"{path} {names}: {kind}{default}"
    model = command.settings() if getattr(command, "settings", None) else None
    if model is recipe:
        yield f"{path} takes the keys of a recipe"
    elif model is not None:
        yield from (f"{path} {line}" for line in nested(model))
    for name in sorted(getattr(command, "commands", ())):
        yield from _command(f"{path} {name}", command.commands[name], recipe)


def recipe_keys() -> Iterator[str]:
    """The keys of a recipe."""
    from tokdyn.recipe import Recipe

    yield from (f"recipe {line}" for line in nested(Recipe))


if __name__ == "__main__":
    LIST.write_text("\n".join(lines()) + "\n", encoding="utf-8")
