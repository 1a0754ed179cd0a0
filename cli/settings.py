"""Build the pydantic settings of a command from its arguments, and the table of settings in --help."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .arguments import Words, split

if TYPE_CHECKING:
    from pydantic import BaseModel
    from pydantic.fields import FieldInfo

    from tokdyn.scaling.settings import ScalingSettings

Settings = TypeVar("Settings", bound="BaseModel")

_BRIEF = 90  # characters of a meaning that --help shows, if it has a comma before
_SHORT = 12  # characters of a default that --help shows
_NOTHING = frozenset({"", "null", "~"})  # as in YAML


def flags(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the keys of booleans, which may be written without a value, those in sections included.

    Args:
        model: the pydantic model of the settings, or of a section.
        prefix: prepended to the keys, such as "training." for a section.
    """
    for name, info in model.model_fields.items():
        members = _members(info.annotation)
        if bool in members:
            yield prefix + name
        for member in filter(_is_section, members):
            yield from flags(member, f"{prefix}{name}.")


def read(args: Sequence[str], model: type[Settings], words: Sequence[str] = ()) -> Settings:
    """Build the settings of a command from its arguments.

    Args:
        args: the arguments after the name of the command: `key=value`, `--key value`, or positional words. The key of a
            setting in a section is `section.key`. Values are read as YAML; text and paths are taken as they are.
        model: the pydantic model of the settings.
        words: keys whose values may also be given as positional words, in order.

    Raises:
        RecipeError: there are too many words, a key is unknown, or a value is invalid.
    """
    from pydantic import ValidationError

    from tokdyn.recipe.explain import explain
    from tokdyn.recipe.files import parse_overrides

    given = split(args, frozenset(flags(model)))
    placed = zip(words, given.take(optional=[word.upper() for word in words]), strict=True)
    settings = {**{key: word for key, word in placed if word}, **given.settings}
    texts = {key: text for key, text in settings.items() if key in _texts(model) and text not in _NOTHING}
    values = {key: text for key, text in settings.items() if key not in texts}
    try:
        return model(**parse_overrides(Words((), values).overrides()), **texts)
    except ValidationError as error:
        raise explain(model, error, "settings") from error


def take_cluster(given: Words, dry_run: bool) -> tuple[Words, ScalingSettings | None]:
    """Take the settings of the GPUs that --dry-run works a training out for.

    Args:
        given: the words of the command.
        dry_run: whether --dry-run was given.

    Returns:
        The other words, and the settings; None without any.

    Raises:
        RecipeError: there are such settings without --dry-run, or they are wrong.
    """
    from tokdyn.errors import RecipeError
    from tokdyn.scaling.settings import ScalingSettings

    own = {key: text for key, text in given.settings.items() if key in ScalingSettings.model_fields}
    if own and not dry_run:
        raise RecipeError(f"{next(iter(own))} is a setting of --dry-run; add --dry-run, or remove it.")
    if not own:
        return given, None
    others = {key: text for key, text in given.settings.items() if key not in own}
    return Words(given.positional, others), read(Words((), own).overrides(), ScalingSettings)


def is_of_pipeline(args: Sequence[str]) -> bool:
    """Return whether the first positional word of a command names a pipeline of diffusers, by folder or hub id.

    Raises:
        CheckpointError: it does not, but prompts are given, which only pipelines draw.
    """
    from tokdyn.bases.names import names_pipeline

    prompted = any(word.lstrip("-").partition("=")[0] == "prompts" for word in args)
    name = next((word for word in args if "=" not in word and not word.startswith("-")), None)
    return names_pipeline(name, wanted=prompted)


def check_model(name: str | None, sizes: bool = False) -> None:
    """Refuse a name that cannot be that of a model, before torch is loaded.

    Args:
        name: the name; None is accepted.
        sizes: accept named sizes such as DiT-S/2, which have no trained weights.

    Raises:
        CheckpointError: there is no such model.
    """
    from tokdyn.bases.names import check_name, is_size

    if name is not None and not (sizes and is_size(name)):
        check_name(name)


def check_stacks(stacks: Sequence[str] | None, models: bool = True) -> None:
    """Refuse misspelt words of the stacks given with --stack, before torch is loaded; `models` if they may name any.

    Raises:
        RecipeError: a key, a method or a setting of a method is unknown.
        CheckpointError: there is no such model.
    """
    from tokdyn.bench.stacks import check_words
    from tokdyn.catalog import stored

    check_words(stacks or (), stored().explained, models)


def _texts(model: type[BaseModel]) -> set[str]:
    """Return the keys whose values are texts or paths, which are taken literally, not as YAML."""
    plain = {str, Path, type(None)}
    return {name for name, info in model.model_fields.items() if set(_members(info.annotation)) <= plain}


def rows(model: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield (key, "meaning [type, default]") for each setting, those in sections included."""
    for key, meaning, info in _described(model):
        default = "required" if info.is_required() else f"default {_text(info)}"
        yield key, f"{meaning} [{_type(info.annotation)}, {default}]".strip()


def brief_rows(model: type[BaseModel]) -> dict[str, str]:
    """Map each setting, those in sections included, to the first clause of its meaning and its default."""
    found = {}
    for key, meaning, info in _described(model):
        default = "required" if info.is_required() else _text(info)
        clause = re.split(r"[.;](?:\s|$)", re.sub(r"\s*\([^()]*\)", "", meaning), maxsplit=1)[0]
        comma = clause.rfind(", ", 0, _BRIEF) if len(clause) > _BRIEF else -1
        choices = [str(each) for kind in _members(info.annotation) for each in _choices(kind)]
        start = clause if comma < 0 else " or ".join(choices) if choices else clause[:comma]
        plain = default not in ("null", "") and len(default) <= _SHORT and not default.startswith("(")
        found[key] = f"{start or clause} [{default}]".strip() if plain else start or clause
    return found


def _described(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, FieldInfo]]:
    """Yield key, meaning and field of each setting, those in sections included; arguments as for `flags`."""
    meanings = _attributes(model)
    for name, info in model.model_fields.items():
        sections = [member for member in _members(info.annotation) if _is_section(member)]
        for section in sections:
            yield from _described(section, f"{prefix}{name}.")
        if not sections:
            yield f"{prefix}{name}", info.description or meanings.get(name, ""), info


def _is_section(member: Any) -> bool:
    """Return whether a type is a pydantic model, whose fields are settings of their own."""
    return inspect.isclass(member) and hasattr(member, "model_fields")


def _choices(member: Any) -> tuple[Any, ...]:
    """Return the values of a `Literal`; none of another type."""
    return typing.get_args(member) if typing.get_origin(member) is typing.Literal else ()


def _members(annotation: Any) -> list[Any]:
    """Return the alternatives of a type: the members of a union, or the type itself."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [member for part in typing.get_args(annotation) for member in _members(part)]
    return [annotation]


def _type(annotation: Any) -> str:
    """Describe the type of a setting for users, such as `int`, `ddpm | ddim` or `float or null`."""
    names = []
    for member in _members(annotation):
        origin = typing.get_origin(member)
        if origin is typing.Literal:
            names.append(" | ".join(str(choice) for choice in typing.get_args(member)))
        elif origin is not None:
            inner = ", ".join("..." if part is ... else _type(part) for part in typing.get_args(member))
            names.append(f"{origin.__name__}[{inner}]")
        elif member is type(None):
            names.append("null")
        else:
            names.append({"str": "text", "Path": "path"}.get(member.__name__, member.__name__))
    return " or ".join(names)


def _text(info: FieldInfo) -> str:
    """Return the default of a setting as a user would write it."""
    value = info.get_default(call_default_factory=True)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _attributes(model: type[BaseModel]) -> dict[str, str]:
    """Read the meaning of each field from the `Attributes:` sections of the docstrings of a class and its bases.

    What a class says of a field goes before what its bases say.
    """
    meanings: dict[str, str] = {}
    for kind in (kind for kind in reversed(model.__mro__) if hasattr(kind, "model_fields") and kind.model_fields):
        _, _, section = inspect.cleandoc(vars(kind).get("__doc__") or "").partition("Attributes:\n")
        for entry in re.split(r"\n(?= {4}\w)", section.partition("\n\n")[0]):
            name, colon, meaning = entry.strip().partition(":")
            if colon:
                meanings[re.sub(r"\s*\(.*\)$", "", name)] = " ".join(meaning.split())
    return meanings
