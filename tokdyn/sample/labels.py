"""Classes to sample: names and numbers become labels, and labels become names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from tokdyn.errors import RecipeError
from tokdyn.report.style import drawable
from tokdyn.sample.loading import ModelInfo

NO_CLASS = "none"


def class_numbers(classes: Sequence[int | str] | None, info: ModelInfo, model: Any) -> tuple[int, ...]:
    """Return the labels to sample.

    Args:
        classes: names, numbers or "none"; a name that looks like a number is a name. None takes all classes.
        info: class names of the model.
        model: number of classes; the number after the last one means no class.

    Raises:
        RecipeError: there is no such class.
    """
    total = model.config.num_classes
    if classes is None:
        return tuple(range(total))
    if not classes:
        raise RecipeError("classes is empty: name some, or leave it out for all.")
    return tuple(_number(entry, info.class_names, total) for entry in classes)


def class_name(label: int, info: ModelInfo, model: Any) -> str:
    """Return the name of a class if it is known and can be drawn, otherwise its number."""
    if label == model.config.num_classes:
        return "no class"
    name = info.class_names[label] if label < len(info.class_names) else str(label)
    return name if drawable(name) == name else str(label)


def _number(entry: int | str, names: Sequence[str], total: int) -> int:
    if str(entry) in names:  # also a number, so that 1 means the same alone and in a list
        return names.index(str(entry))
    if entry == NO_CLASS:
        return total
    if isinstance(entry, int) or entry.isdecimal():
        if 0 <= int(entry) < total:
            return int(entry)
        raise RecipeError(f"class {entry} does not exist: give 0 to {total - 1}, or {NO_CLASS}.")
    close = difflib.get_close_matches(entry, names, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(names[:12]) or f'0 to {total - 1}'}."
    raise RecipeError(f"class {entry} does not exist: {hint}")
