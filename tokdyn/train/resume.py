"""Decide with which changes of its recipe a run may be resumed."""

from __future__ import annotations

from typing import Any

from tokdyn.errors import CheckpointError
from tokdyn.recipe import Recipe, resolve

HARMLESS = (
    "name",
    "description",
    "out",
    "data.path",
    "upcycle.base",
    "upcycle.after",
    "data.in_memory",
    "data.memory_limit",
    "preview",
    "training.workers",
    "training.log_every",
    "training.checkpoint_every",
    "training.checkpoint_minutes",
    "training.keep_checkpoints",
    "training.sample_every",
    "training.trackers",
)
"""Do not change what is computed. Data and base may lie elsewhere, because their contents are compared instead."""

ROUNDING = (
    "training.accumulation",
    "training.gradient_checkpointing",
    "training.compile",
    "optimizer.implementation",
)
"""Change results only by rounding."""

LENGTH = ("training.images", "training.steps", "compute_match")
"""May change if no schedule depends on the length."""


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested settings into one dict with dotted keys; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        path = f"{prefix}{key}"
        flat |= flatten(value, f"{path}.") if isinstance(value, dict) else {path: value}
    return flat


def changed_keys(old: Recipe, new: Recipe) -> list[str]:
    """List the dotted keys in which two recipes differ."""
    before, after = (flatten(recipe.model_dump(mode="json")) for recipe in (old, new))
    missing = object()
    return [key for key in sorted({*before, *after}) if before.get(key, missing) != after.get(key, missing)]


def _is_one_of(key: str, group: tuple[str, ...]) -> bool:
    return any(key == entry or key.startswith(f"{entry}.") for entry in group)


def check_resumable(
    stored: dict[str, Any], recipe: Recipe, data: dict[str, Any], folder: str, base: dict[str, str] | None = None
) -> list[str]:
    """Refuse to resume a run with settings, data or a base that would make it another run.

    Args:
        stored: The state.json of the checkpoint, with its "recipe", "data" and "base".
        recipe: The recipe that the run is resumed with.
        data: The identity of the data that are open.
        folder: The run's folder, for an error message.
        base: Name and SHA-256 of the base of an upcycled model.

    Returns:
        Changed keys that let the rest of the run differ by rounding.

    Raises:
        CheckpointError: A key changed that must not, or data or base are others; the message says which.
    """
    old = resolve(stored["recipe"], f"The recipe stored in {folder}")
    allowed = HARMLESS + ROUNDING + (LENGTH if recipe.optimizer.decay == "none" else ())
    changed = changed_keys(old, recipe)
    refused = [key for key in changed if not _is_one_of(key, allowed)]
    if refused:
        before = flatten(old.model_dump(mode="json"))
        listed = ", ".join(f"{key} (was {before.get(key)!r})" for key in refused)
        raise CheckpointError(
            f"{folder} was started with other settings: {listed}. Set them back to resume the run, or choose another "
            "out=FOLDER to start a new one."
        )
    if (stored.get("base") or {}).get("sha256") != (base or {}).get("sha256"):
        raise CheckpointError(
            f"{folder} was started from other weights than upcycle.base {base and base['base']} holds; set "
            "upcycle.base to the original base to resume the run."
        )
    if stored["data"] != data:
        raise CheckpointError(
            f"{folder} was trained on other data than {recipe.data.path or 'the recipe describes'}: the number, order "
            "or content of the samples differs. Set data.path to the original data to resume the run."
        )
    return [key for key in changed if _is_one_of(key, ROUNDING)]
