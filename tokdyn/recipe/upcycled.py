"""The recipe of an upcycling run: a shipped one, what the base was trained with, and the user's settings over both."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokdyn.errors import RecipeError
from tokdyn.files import json_object
from tokdyn.recipe import Recipe, files, resolve

FACTS = "tokdyn.json"


def facts_of(base: str) -> dict[str, Any]:
    """What a run of tokdyn wrote beside the weights of a base: objective, data, class names; empty for others.

    Args:
        base: a file or a folder.
    """
    path = Path(base).expanduser()
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder / "ema", folder / "model"):
        if path.exists() and (place / FACTS).is_file():
            return json_object(place / FACTS)
    return {}


def upcycling(base: str | None, name: str = "upcycle/dc", settings: Iterable[str] = ()) -> Recipe:
    """The recipe that upcycles a base.

    The data and the objective are those that the base was trained with, as far as it says so; settings win over both,
    and both over the recipe.

    Args:
        base: replaces the base of the recipe; None keeps it.
        name: of a recipe with a section `upcycle`, or its file, or the folder of a run.
        settings: words such as "training.steps=1000".

    Raises:
        RecipeError: anything that is wrong with any of it.
    """
    found = files.read(name)
    if not isinstance(found.get("upcycle"), dict):
        raise RecipeError(f"The recipe '{name}' has no section upcycle; choose one of the recipes upcycle/...")
    given = files.parse_overrides(settings)
    if base is not None:
        found = files.deep_merge(found, {"upcycle": {"base": base}})
    source = files.deep_merge(found, given)["upcycle"].get("base")
    facts = facts_of(source) if isinstance(source, str) else {}
    known: dict[str, Any] = {}
    if isinstance(facts.get("objective"), dict):
        known["objective"] = facts["objective"]
    if isinstance(facts.get("data"), dict):
        known["data"] = {key: value for key, value in facts["data"].items() if key != "path"}
    return resolve(files.deep_merge(files.deep_merge(found, known), given), f"Recipe '{name}'")
