"""Decide which settings of its recipe may change when a run is resumed."""

from __future__ import annotations

from pathlib import Path
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
    "data.cache",
    "data.cache_limit",
    "preview",
    "training.workers",
    "training.log_every",
    "training.checkpoint_every",
    "training.checkpoint_minutes",
    "training.keep_checkpoints",
    "training.sample_every",
    "training.trackers",
    "training.spike",
    "training.on_bad_loss",
    "training.loss_limit",
    "chunking.on_collapse",
)
"""Settings that do not change what is computed, unless a loss is bad, and that is what they are for.

The data and the base may be moved: their contents are compared.
"""

ROUNDING = (
    "training.accumulation",
    "training.gradient_checkpointing",
    "training.sharding",
    "training.compile",
    "optimizer.implementation",
)
"""Settings that change the results only by rounding."""

LENGTH = ("training.images", "training.steps", "compute_match")
"""Settings of the length of the run, which may change if the learning rate does not decay over it."""


_STATE = {"seconds": (int, float), "recipe": (dict,), "data": (dict,), "base": (dict, type(None))}
"""What the state.json of a checkpoint must hold, and of which types."""


def check_complete(folder: Path, state: dict[str, Any]) -> None:
    """Refuse a checkpoint whose state.json lacks what a run is resumed with.

    Args:
        folder: The checkpoint's folder.
        state: The contents of its state.json.

    Raises:
        CheckpointError: A value is missing or of another type; the message names it.
    """
    for key, kinds in _STATE.items():
        value = state.get(key, ())
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise CheckpointError(f"The checkpoint {folder} is damaged: its state.json has no usable {key!r}.")
    if not 0.0 <= state["seconds"] < float("inf"):
        raise CheckpointError(f"The checkpoint {folder} is damaged: its state.json says seconds={state['seconds']}.")


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested settings into one dict with dotted keys such as "data.path". Lists are not taken apart."""
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
    """Return whether a dotted key, or a section that holds it, is in a group of settings."""
    return any(key == entry or key.startswith(f"{entry}.") for entry in group)


def check_resumable(
    stored: dict[str, Any], recipe: Recipe, data: dict[str, Any], folder: str, base: dict[str, str] | None = None
) -> list[str]:
    """Refuse to resume a run whose settings, data or base differ from those it was started with.

    Args:
        stored: The contents of the checkpoint's state.json: the "recipe", "data" and "base" of the run.
        recipe: The recipe to resume with.
        data: `Dataset.identity()` of the data to resume with.
        folder: The run's folder, for error messages.
        base: Name ("base") and SHA-256 ("sha256") of the base of an upcycled model.

    Returns:
        The changed settings that make the rest of the run differ by rounding.

    Raises:
        CheckpointError: A setting changed that must not, the data are not the same, or the base is not.
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
    known = {"kind": None, **stored["data"]}  # earlier versions had fewer keys
    if any(data.get(key) != value for key, value in known.items()):
        raise CheckpointError(
            f"{folder} was trained on other data than {recipe.data.path or 'the recipe describes'}: the number, order "
            "or content of the samples differs. Set data.path to the original data to resume the run."
        )
    return [key for key in changed if _is_one_of(key, ROUNDING)]
