"""Read the methods that a user has typed, in the words of the rest of the command line, before torch is loaded."""

from __future__ import annotations

from typing import Any

from tokdyn.errors import RecipeError
from tokdyn.method_names import ALIASES, full_name
from tokdyn.recipe import yaml_text
from tokdyn.recipe.explain import nearest

_EXAMPLE = "[{method: TokenMerge, ratio: 0.3}]"


def read_methods(text: str) -> Any:
    """Read methods.

    Args:
        text: a list of methods such as [{method: TokenMerge, ratio: 0.3}]; one method, by its name or in braces; a
            dictionary with a list for each denoiser of a pipeline; or the name of a folder, of a preset file or of a
            preset, which is returned as it is.

    Returns:
        A list of dictionaries, a dictionary of such lists by denoiser, or a name; [] for no text. The settings of the
        methods are not checked.

    Raises:
        RecipeError: it is not YAML, or names a method that does not exist.
    """
    text = text.strip()
    if not text:
        return []
    if text[0] not in "[{":
        known = full_name(text) in ALIASES
        return [{"method": text}] if known else text
    content = yaml_text.parse(text, "methods")
    if isinstance(content, dict) and "method" in content:
        content = [content]
    for each in content.values() if isinstance(content, dict) else [content]:
        if not isinstance(each, list) or not all(isinstance(one, dict) for one in each):
            raise RecipeError(f"methods={text} is no list of methods: write one such as {_EXAMPLE}.")
        for one in each:
            _check_name(one.get("method"))
    return content


def _check_name(name: Any) -> None:
    """Refuse a method that does not exist."""
    if name is None:
        raise RecipeError(f"methods: a method has no name: write it as in {_EXAMPLE}.")
    if full_name(name) not in ALIASES:
        raise RecipeError(f"there is no method {name!r}{nearest(str(name), ALIASES)}.")
