"""Convert the names and numbers of classes to labels, and labels to names."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from tokdyn.errors import RecipeError
from tokdyn.report.style import with_drawable_letters
from tokdyn.sample.loading import ModelInfo

NO_CLASS = "none"


def class_numbers(classes: Sequence[int | str] | None, info: ModelInfo, model: Any) -> tuple[int, ...]:
    """Return the labels of classes; "none" becomes the label of unconditional samples, the number of classes.

    Args:
        classes: names, numbers or "none"; None takes all classes. A number that is the name of a class is read as the
            name.
        info: holds the names of the model's classes.
        model: its configuration holds the number of classes.

    Raises:
        RecipeError: the list is empty, or there is no such class.
    """
    total = model.config.num_classes
    if classes is None:
        return tuple(range(total))
    if not classes:
        raise RecipeError("classes is empty: name at least one class, or leave the setting out to sample all.")
    return tuple(_number(entry, info.class_names, total) for entry in classes)


def class_name(label: int, info: ModelInfo, model: Any) -> str:
    """Return the name of a class, or its number if the name is not known or has characters that cannot be drawn."""
    if label == model.config.num_classes:
        return "no class"
    name = info.class_names[label] if label < len(info.class_names) else str(label)
    return name if with_drawable_letters(name) == name else str(label)


def _number(entry: int | str, names: Sequence[str], total: int) -> int:
    """Return the label of one entry of the setting `classes`; the model has `total` classes."""
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
