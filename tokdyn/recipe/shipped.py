"""Find and read the recipes that ship with the package."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path

from tokdyn.errors import RecipeError
from tokdyn.recipe.explain import nearest


@cache
def folder() -> Path:
    """Return the folder of the shipped recipes: that of tokdyn.recipes, or in a checkout the one beside the package.

    Raises:
        RecipeError: The folder is missing.
    """
    checkout = Path(__file__).resolve().parents[2] / "recipes"
    try:
        installed = Path(str(resources.files("tokdyn.recipes")))
    except ModuleNotFoundError:
        installed = checkout
    if not installed.is_dir():
        raise RecipeError(f"The shipped recipes are missing from {installed}; install tokdyn again.")
    return installed


def names() -> list[str]:
    """List the names of the shipped recipes, such as "demo" and "cifar10/dit-flops".

    Files whose name starts with '_' are left out: they are only there for others to extend.
    """
    root = folder()
    recipes = (path for path in root.rglob("*.yaml") if not path.name.startswith("_"))
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in recipes)


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
