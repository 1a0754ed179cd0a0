"""The base class of recipe sections and other checked settings, and the number types of their fields."""

from __future__ import annotations

import math
import typing
from types import UnionType
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from tokdyn.limits import STEPS, Limit
from tokdyn.reading import shown


def at_most(limit: Limit) -> AfterValidator:
    """Return a validator of numbers that refuses those above a limit."""

    def check(value: int) -> int:
        if excess := limit.excess(value):
            raise ValueError(f"these are {excess}")
        return value

    return AfterValidator(check)


LARGEST = 1e12
"""The largest size of a setting that is no whole number."""
SMALLEST = 1e-30
"""The smallest positive number that a setting may be by which something is divided."""
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=0), at_most(STEPS)]
Positive = Annotated[int, Field(ge=1), at_most(STEPS)]
Divisor = Annotated[float, Field(ge=SMALLEST)]
Weight = Annotated[float, Field(ge=0.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Section(BaseModel):
    """Immutable settings that refuse unknown keys, NaN, infinite and immense numbers, and what only looks like one.

    pydantic reads true as 1 and the text "0010" as 10; here both are mistakes. So is text that no file can hold.
    Sections of recipes and methods are such settings.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _is_what_it_says(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[str(info.field_name)]
        require_plain(value, Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation)
        return value


def require_plain(value: Any, annotation: Any) -> None:
    """Raise a ValueError if a value is, or holds, a boolean or a text where a type has only numbers, or an immense one.

    Args:
        value: a value before its validation.
        annotation: the type that it is for. A type with a validator of its own that reads other values may have text.
    """
    _require(value, *_leaves(annotation))


def _require(value: Any, leaves: set[Any], read: bool) -> None:
    """Do what `require_plain` does, with the plain types in the type, and whether a validator reads other values."""
    if isinstance(value, (list, tuple)):
        for each in value:
            _require(each, leaves, read)
    elif isinstance(value, bool):
        if not read and bool not in leaves and leaves & {int, float}:
            raise ValueError(f"expected a number, got {str(value).lower()}")
    elif isinstance(value, int | float):
        if not read and float in leaves and (wrong := immense(value)):
            raise ValueError(wrong)
    elif isinstance(value, str):
        if not read and leaves <= {int, float, type(None)}:
            raise ValueError(f"expected a number without quotes, got the text {value[:80]!r}")
        require_text(value)


def immense(value: float) -> str | None:
    """Return what is wrong with a finite number that is far too large; None if it is not, or not finite."""
    if LARGEST < abs(value) < math.inf:
        return f"expected a number of at most {LARGEST:g} in size, got {shown(value)}"
    return None


def require_text(value: str) -> None:
    """Raise a ValueError if a text holds a NUL or half of a character, which neither paths nor files can hold."""
    if "\0" in value:
        raise ValueError("it holds a NUL character; remove it")
    try:
        value.encode("utf-8", "surrogateescape")  # names of files need not be UTF-8
    except UnicodeEncodeError as error:
        raise ValueError("it holds half of a character (a surrogate); remove it") from error


def _leaves(annotation: Any) -> tuple[set[Any], bool]:
    """Return the plain types in a type, and whether a validator reads values of other types.

    Literals count as the types of their values, and anything that is no type here as text.
    """
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        leaves, read = _leaves(parts[0])
        return leaves, read or any(isinstance(each, BeforeValidator) for each in parts[1:])
    if origin is typing.Literal:
        return {type(each) for each in parts}, False
    if origin in (typing.Union, UnionType, tuple, list):
        found = [_leaves(part) for part in parts if part is not ...]
        return {leaf for leaves, _ in found for leaf in leaves}, any(read for _, read in found)
    return {annotation if annotation in (int, float, bool, type(None)) else str}, False


def listed(value: Any) -> Any:
    """Turn a string such as "0,0.3" into the list of its parts, and a single number into a list of one.

    Other values are returned unchanged.
    """
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else value
