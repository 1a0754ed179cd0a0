"""Find and read the recipes that ship with the package."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tokdyn.errors import RecipeError
from tokdyn.files import shipped_recipes
from tokdyn.recipe.explain import nearest

PRESETS = "presets"
"""The folder of the shipped presets, which are no recipes."""


@cache
def folder() -> Path:
    """Return the folder of the shipped recipes; raise a RecipeError if it is missing."""
    return shipped_recipes()


def names() -> list[str]:
    """List the names of the shipped recipes, such as "demo" and "cifar10/dit-flops".

    Files whose name starts with '_' are left out: they are only there for others to extend. So are presets.
    """
    root = folder()
    recipes = (path.relative_to(root) for path in root.rglob("*.yaml") if not path.name.startswith("_"))
    return sorted(path.with_suffix("").as_posix() for path in recipes if path.parts[0] != PRESETS)


def path(name: str) -> Path:
    """Return the path of a shipped recipe.

    Raises:
        RecipeError: There is no such recipe.
    """
    known = names()
    if name not in known:
        raise RecipeError(f"There is no shipped recipe '{name}'{nearest(name, known)}.")
    return folder() / f"{name}.yaml"


def show(name: str) -> str:
    """Return the text of a shipped recipe's file, comments included."""
    return path(name).read_text(encoding="utf-8")
