"""Compose the recipe of an upcycling run from a shipped recipe, the settings of the base's training and the user's.

A base is the pretrained DiT that upcycling starts from.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokdyn.bases import rows
from tokdyn.bases.table import shipped_folder
from tokdyn.errors import RecipeError
from tokdyn.files import json_object, user_path
from tokdyn.recipe import Recipe, files, resolve
from tokdyn.upcycling.settings import DISTILLED, split_methods

_FACTS = "tokdyn.json"
_DEFAULT_PHASES = [phase.model_dump() for phase in DISTILLED]


def facts_of(base: str) -> dict[str, Any]:
    """Return what is known of the training of a base: objective, data, class names. Downloads nothing.

    Args:
        base: The name of a base, a file or a folder.

    Returns:
        The contents of the tokdyn.json beside its weights; if there is none, the objective of a base that
        `tokdyn models` lists; otherwise an empty dict.
    """
    path = user_path(base)
    row = None if path.exists() else rows().get(base)
    if row is not None and row.source == "shipped":
        path = shipped_folder(row.place)
    folder = path if path.is_dir() else path.parent
    for place in (folder, folder / "ema", folder / "model"):
        if path.exists() and (place / _FACTS).is_file():
            return json_object(place / _FACTS)
    return {} if row is None else {"objective": {"kind": row.objective}}


def upcycling_recipe(
    base: str | None, name: str | None = None, settings: Iterable[str] = (), methods: Sequence[str] = ()
) -> Recipe:
    """Return the recipe to upcycle a base with.

    The sections `data` and `objective` are those of the base's training, as far as they are known. They override a
    shipped recipe, but not a recipe file of the user's. Settings override both. If settings change the length of the
    run, phases and warm-ups are scaled with it, unless settings give them too.

    Args:
        base: The base; None takes that of the recipe.
        name: A shipped recipe with a section `upcycle`, a recipe file, or a training folder; None takes the shipped
            recipe for the methods.
        settings: Settings such as "training.steps=1000".
        methods: The methods, see `tokdyn.upcycling.settings.split_methods`. With `name`, only methods that are attached
            after training are allowed.

    Raises:
        RecipeError: The recipe, a setting or a method is wrong.
    """
    trained, after = split_methods(methods)
    if name is not None and trained:
        raise RecipeError(f"the recipe '{name}' already says which methods are trained; remove --method {trained[0]}.")
    name = name or f"upcycle/{'-'.join(sorted(trained) or ['dc'])}"
    sections = files.read(name)
    if not isinstance(sections.get("upcycle"), dict):
        raise RecipeError(f"The recipe '{name}' has no section upcycle; choose one that has, such as upcycle/dc.")
    overrides = files.parse_overrides(settings)
    if after:
        if "after" in overrides.get("upcycle", {}):
            raise RecipeError(
                f"upcycle.after and --method {after[0]['method']} both list methods to attach after training; use one."
            )
        sections = files.deep_merge(sections, {"upcycle": {"after": after}})
    if base is not None:
        sections = files.deep_merge(sections, {"upcycle": {"base": base}})
    source = files.deep_merge(sections, overrides)["upcycle"].get("base")
    facts = facts_of(source) if isinstance(source, str) else {}
    inherited: dict[str, Any] = {}
    if isinstance(facts.get("objective"), dict):
        inherited["objective"] = facts["objective"]
    if isinstance(facts.get("data"), dict):
        inherited["data"] = {key: value for key, value in facts["data"].items() if key != "path"}
    users_file = Path(name).exists()
    layers = (inherited, sections) if users_file else (sections, inherited)
    return resolve(_in_proportion(files.deep_merge(*layers), overrides), f"Recipe '{name}'")


def _in_proportion(sections: files.Settings, overrides: files.Settings) -> files.Settings:
    """Apply overrides to a recipe.

    If they change the number of training steps, the phases and warm-ups that they do not set change in proportion.
    """
    merged = files.deep_merge(sections, overrides)
    training, changed = sections.get("training", {}), overrides.get("training", {})
    if not {"steps", "images", "batch_size"} & set(changed):
        return merged
    if changed.get("steps") is not None or changed.get("images") is not None:
        lengths = {"steps": changed.get("steps"), "images": changed.get("images")}
        merged = {**merged, "training": {**merged["training"], **lengths}}
    before, after = _steps(training), _steps(merged["training"])
    if not before or not after:
        return merged

    def scaled(steps: Any) -> Any:
        return max(1, round(steps * after / before)) if isinstance(steps, int) and steps else steps

    upcycle, own = dict(merged["upcycle"]), overrides.get("upcycle", {})
    phases = upcycle.get("phases") or _DEFAULT_PHASES
    if "phases" not in own and isinstance(phases, list):
        upcycle["phases"] = [{**phase, "steps": scaled(phase.get("steps"))} for phase in phases]
    if "methods" not in own and isinstance(upcycle.get("methods"), list):
        upcycle["methods"] = [
            {**method, "warmup": scaled(method["warmup"])} if "warmup" in method else method
            for method in upcycle["methods"]
        ]
    merged = {**merged, "upcycle": upcycle}
    chunking = merged.get("chunking")
    name = "budget_warmup_steps"
    if isinstance(chunking, dict) and name in chunking and name not in overrides.get("chunking", {}):
        merged["chunking"] = {**chunking, name: scaled(chunking[name])}
    return merged


def _steps(training: Any) -> int | None:
    """Return the number of optimizer steps that a section `training` sets, or None if it sets none."""
    steps, images, batch = training.get("steps"), training.get("images"), training.get("batch_size", 256)
    if isinstance(steps, int):
        return steps
    return -(-images // batch) if isinstance(images, int) and isinstance(batch, int) and batch > 0 else None
