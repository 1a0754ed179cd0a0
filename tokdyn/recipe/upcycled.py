"""The recipe of an upcycling run: a shipped one, what the base was trained with, and the user's settings over both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokdyn.errors import RecipeError
from tokdyn.files import json_object
from tokdyn.recipe import Recipe, files, resolve

FACTS = "tokdyn.json"


def facts_of(base: str) -> dict[str, Any]:
    """What is known of how a base was trained: objective, data, class names; empty for a base that nobody knows.

    Args:
        base: as the user writes it; nothing is downloaded.
    """
    from tokdyn.bases import rows
    from tokdyn.bases.table import shipped_folder

    path = Path(base).expanduser()
    row = None if path.exists() else rows().get(base)
    if row is not None and row.source == "shipped":
        path = shipped_folder(row.place)
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder / "ema", folder / "model"):
        if path.exists() and (place / FACTS).is_file():
            return json_object(place / FACTS)
    return {} if row is None else {"objective": {"kind": row.objective}}


def split_methods(methods: Sequence[str]) -> tuple[list[str], list[dict[str, Any]]]:
    """Methods that are trained into a model, and settings of those that are attached afterwards.

    Args:
        methods: such as ["dc", "dydit", "cache", "skip=0.7", "merge=0.3"]; a number is the share of the FLOPs to come
            down to, or the ratio of merge.

    Raises:
        RecipeError: one is unknown, listed twice, or its number is none.
    """
    trained, after, names = [], [], []
    for each in methods:
        name, equals, text = each.partition("=")
        names.append(name)
        if name in ("dc", "dydit") and not equals:
            trained.append(name)
            continue
        if name not in ("cache", "skip", "merge"):
            raise RecipeError(
                f"--method {each} is unknown; known are dc and dydit, which are trained, and cache, skip=SHARE and "
                "merge, which are attached afterwards."
            )
        settings: dict[str, Any] = {"method": name}
        if equals:
            try:
                settings["ratio" if name == "merge" else "flops"] = float(text)
            except ValueError as error:
                raise RecipeError(f"--method {each}: {text!r} is no number, such as {name}=0.7.") from error
        after.append(settings)
    if len(set(names)) < len(names):
        raise RecipeError(f"--method {', '.join(methods)}: name each method once.")
    return trained, after


def upcycling(
    base: str | None, name: str | None = None, settings: Iterable[str] = (), methods: Sequence[str] = ()
) -> Recipe:
    """The recipe that upcycles a base.

    The data and the objective are those that the base was trained with, as far as it says so; settings win over both,
    and both over the recipe.

    Args:
        base: replaces the base of the recipe; None keeps it.
        name: of a recipe with a section `upcycle`, or its file, or the folder of a run; None takes the one of the
            methods.
        settings: words such as "training.steps=1000".
        methods: see `split_methods`; with a recipe, only those that are attached afterwards.

    Raises:
        RecipeError: anything that is wrong with any of it.
    """
    trained, after = split_methods(methods)
    if name is not None and trained:
        raise RecipeError(f"the recipe '{name}' says what is trained; leave --method {trained[0]} out.")
    name = name or f"upcycle/{'-'.join(sorted(trained) or ['dc'])}"
    found = files.read(name)
    if not isinstance(found.get("upcycle"), dict):
        raise RecipeError(f"The recipe '{name}' has no section upcycle; choose one of the recipes upcycle/...")
    given = files.parse_overrides(settings)
    if after:
        found = files.deep_merge(found, {"upcycle": {"after": after}})
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
