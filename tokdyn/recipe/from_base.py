"""The recipe of an upcycling run: a shipped one, what the base was trained with, and the user's settings over both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokdyn.errors import RecipeError
from tokdyn.files import json_object
from tokdyn.recipe import Recipe, files, resolve
from tokdyn.upcycling.settings import DISTILLED

FACTS = "tokdyn.json"
DEFAULTS = [phase.model_dump() for phase in DISTILLED]


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
        if "after" in given.get("upcycle", {}):
            raise RecipeError("upcycle.after and --method both say what is attached afterwards; give one of them.")
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
    own = Path(name).exists()  # a user's file says what it means, a shipped recipe what is usual
    found = files.deep_merge(known, found) if own else files.deep_merge(found, known)
    return resolve(_in_proportion(found, given), f"Recipe '{name}'")


def _in_proportion(found: files.Settings, given: files.Settings) -> files.Settings:
    """The recipe with the settings over it; a run of another length gets phases and warm-ups in proportion."""
    whole = files.deep_merge(found, given)
    training, asked = found.get("training", {}), given.get("training", {})
    if not {"steps", "images", "batch_size"} & set(asked):
        return whole
    if asked.get("steps") is not None or asked.get("images") is not None:
        lengths = {"steps": asked.get("steps"), "images": asked.get("images")}
        whole = {**whole, "training": {**whole["training"], **lengths}}
    before, after = _steps(training), _steps(whole["training"])
    if not before or not after:
        return whole

    def scaled(steps: Any) -> Any:
        return max(1, round(steps * after / before)) if isinstance(steps, int) and steps else steps

    upcycle, own = dict(whole["upcycle"]), given.get("upcycle", {})
    listed = upcycle.get("phases") or DEFAULTS
    if "phases" not in own and isinstance(listed, list):
        upcycle["phases"] = [{**phase, "steps": scaled(phase.get("steps"))} for phase in listed]
    if "methods" not in own and isinstance(upcycle.get("methods"), list):
        upcycle["methods"] = [
            {**each, "warmup": scaled(each["warmup"])} if "warmup" in each else each for each in upcycle["methods"]
        ]
    whole = {**whole, "upcycle": upcycle}
    chunking = whole.get("chunking")
    name = "budget_warmup_steps"
    if isinstance(chunking, dict) and name in chunking and name not in given.get("chunking", {}):
        whole["chunking"] = {**chunking, name: scaled(chunking[name])}
    return whole


def _steps(training: Any) -> int | None:
    """Steps of a run, None where its length is not given as numbers."""
    steps, images, batch = training.get("steps"), training.get("images"), training.get("batch_size", 256)
    if isinstance(steps, int):
        return steps
    return -(-images // batch) if isinstance(images, int) and isinstance(batch, int) and batch > 0 else None
