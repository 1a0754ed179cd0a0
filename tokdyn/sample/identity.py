"""Decides whether the images in a folder were sampled as they would be now, so that only missing ones are sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tokdyn.attach import attachment_of
from tokdyn.data.vae import weights_digest
from tokdyn.errors import RecipeError
from tokdyn.methods.registry import to_settings
from tokdyn.sample.job import Job
from tokdyn.sample.result import BudgetResult

RESULT = "sample.json"

_DECIDING = frozenset(
    {
        "seed",
        "steps",
        "guidance",
        "guidance_channels",
        "guidance_interval",
        "tail_drop",
        "drop_curve",
        "uncond_tail_drop",
    }
    | {"class_folders"}
)


def identity(job: Job) -> dict[str, Any]:
    """Return what decides the images, as JSON data; the number of images and the batch size do not."""
    settings = job.config.model_dump(mode="json", include=set(_DECIDING))
    return settings | {
        "classes": list(job.classes),
        "scheduler": job.scheduler,
        "clip": job.clip,
        "precision": job.precision,
        "device": job.device.type if job.scheduler == "ddpm" else "any",  # see tokdyn.diffusion.randomness
        "objective": job.objective.model_dump(mode="json"),
        "weights": weights_digest(job.model),
        "methods": _methods(job),
        "vae": None if job.decoder.vae is None else weights_digest(job.decoder.vae),
    }


def _methods(job: Job) -> list[dict[str, Any]] | None:
    """Describe the methods on the model; their weights are part of the digest of the model."""
    attachment = attachment_of(job.model)
    if attachment is None:
        return None
    return [to_settings(method) for method in attachment.methods]


def earlier_budgets(folder: Path, now: dict[str, Any]) -> dict[float, BudgetResult]:
    """Return the results of the images that a folder holds already, by tail drop; empty if it holds none.

    Args:
        folder: the ``out`` of the job.
        now: the present identity, from `identity`.

    Raises:
        RecipeError: the folder holds images of other settings or of unknown origin, not to be mixed with new ones.
    """
    if not any(folder.rglob("images/**/*.png")):
        return {}
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        earlier = dict(content["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{folder} holds images, but no {RESULT} that says how they were made: choose another out."
        ) from error
    changed = [key for key, value in now.items() if earlier.get(key) != value]
    if changed:
        raise RecipeError(
            f"{folder} holds images made with another {', another '.join(changed)}: choose another out, or remove them."
        )
    try:
        budgets = [BudgetResult.model_validate(budget) for budget in content["budgets"]]
    except (ValidationError, KeyError, TypeError):  # of another version: only the costs of the images are lost
        budgets = []
    return {budget.tail_drop: budget for budget in budgets}
