"""Turn a failed validation into one sentence: the key, what was expected, and the nearest valid key."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from tokdyn.errors import RecipeError
from tokdyn.reading import one_line, shown

_SHOWN = 4  # mistakes listed in a message; further ones are only counted
_LONGEST = 80  # characters of a key, of which no valid one has as many
_SENTENCE = 400  # characters of a sentence, longer than any that lists the valid keys


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return a hint for an error message: " (did you mean 'x'?)", or if no valid word is similar, a list of all.

    Args:
        word: The wrong word.
        valid: The valid words; the hint is empty if there are none.
    """
    choices = sorted(set(valid))
    close = difflib.get_close_matches(word[:_LONGEST], choices, n=1, cutoff=0.6)
    if close:
        return f" (did you mean '{close[0]}'?)"
    return f" (valid: {', '.join(choices)})" if choices else ""


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """List the pydantic models in a field's annotation, also inside unions, `Annotated` and containers."""
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in typing.get_args(annotation) for model in models_in(part)]


def valid_keys(model: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """List the valid keys of a section in a pydantic model.

    Args:
        model: The outermost model.
        path: The field names that lead to the section, outermost first; list indices and union tags are ignored.
    """
    models = [model]
    for part in path:
        fields = [candidate.model_fields[part] for candidate in models if part in candidate.model_fields]
        models = [inner for field in fields for inner in models_in(field.annotation)] or models
    return sorted({name for candidate in models for name in candidate.model_fields})


def _in_sections(model: type[BaseModel], name: str, value: Any) -> list[str]:
    """List the settings of this name in the sections of a model, as key=value; those that take the value, if any do."""
    found: dict[str, bool] = {}
    for section, outer in model.model_fields.items():
        for inner in models_in(outer.annotation):
            if name in inner.model_fields:
                info = inner.model_fields[name]
                kind: Any = Annotated[info.annotation, info]
                try:
                    TypeAdapter(kind).validate_python(value)
                except ValidationError:
                    found[f"{section}.{name}={_brief(value)}"] = False
                else:
                    found[f"{section}.{name}={_brief(value)}"] = True
    return [key for key, takes in found.items() if takes or not any(found.values())]


def _brief(value: Any) -> str:
    """Return a value as a user would write it, cut if it is long."""
    return one_line(value if isinstance(value, str) else shown(value), _LONGEST)


def _sentence(model: type[BaseModel], error: Any) -> str:
    """Describe one of pydantic's errors in the validation of `model`."""
    path = [part for part in error["loc"] if isinstance(part, int) or not part.endswith(")")]
    key = one_line(".".join(str(part) for part in path), _LONGEST)
    value = error.get("input")
    match error["type"]:
        case "extra_forbidden":
            inside = _in_sections(model, str(path[-1]), value) if len(path) == 1 else []
            if inside:
                return f"'{key}' is not a setting (did you mean {' or '.join(inside)}?)"
            return f"'{key}' is not a setting{nearest(str(path[-1]), valid_keys(model, path[:-1]))}"
        case "int_parsing_size":
            return f"'{key}': the number is too large, got {shown(value)}"
        case "missing":
            return f"'{key}' is required; set {key}=VALUE"
        case "value_error":
            reason = str(error["ctx"]["error"]).removesuffix(".")
            return f"'{key}': {reason}" if key else reason
        case "literal_error":
            choices = error["ctx"]["expected"]
            options = [word.strip("'") for word in choices.replace(" or ", ", ").split(", ")]
            close = difflib.get_close_matches(_brief(value), options, n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else ""
            return f"'{key}' should be {choices}, got {shown(value)}{hint}"
        case _:
            return f"'{key}': {error['msg'][0].lower()}{error['msg'][1:]}, got {shown(value)}"


def explain(model: type[BaseModel], error: ValidationError, source: str) -> RecipeError:
    """Turn a ValidationError into a RecipeError of one sentence.

    Args:
        model: The model that was validated.
        error: The error that pydantic raised.
        source: What to call the settings in the message: a path or a recipe name.
    """
    # For a union, pydantic reports the error of each member under the same key; the first is enough.
    by_key: dict[str, str] = {}
    for item in error.errors(include_url=False):
        sentence = one_line(_sentence(model, item), _SENTENCE)
        by_key.setdefault(sentence.split("'")[1] if "'" in sentence else sentence, sentence)
    sentences = list(by_key.values())
    more = f"; and {len(sentences) - _SHOWN} more" if len(sentences) > _SHOWN else ""
    return RecipeError(f"{source}: {'; '.join(sentences[:_SHOWN])}{more}.")
