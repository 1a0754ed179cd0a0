"""Decide whether a folder of images can be resumed: whether its images were sampled with the present settings.

The identity of a job is everything that decides what its images look like. It is stored in sample.json beside them.
"""

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
    """Return the identity of a job as JSON data. The number of images and the batch size are not part of it.

    The tail drops are: a folder is resumed with the list of tail drops that started it.
    """
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
    """Return the settings of the methods attached to the model. Their weights are part of the model's digest."""
    attachment = attachment_of(job.model)
    if attachment is None:
        return None
    return [to_settings(method) for method in attachment.methods]


def earlier_budgets(folder: Path, now: dict[str, Any]) -> dict[float, BudgetResult]:
    """Return the stored results of the images in a folder, by tail drop; empty if it holds no images.

    Args:
        folder: the setting `out` of the job.
        now: the identity of the job.

    Raises:
        RecipeError: the folder holds images that were made with other settings, or has no sample.json that says how
            they were made.
    """
    if not any(folder.rglob("images/**/*.png")):
        return {}
    try:
        content = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        earlier = dict(content["identity"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(
            f"{folder} holds images, but no {RESULT} that says how they were made: choose another out, or remove them."
        ) from error
    changed = [key for key, value in now.items() if earlier.get(key) != value]
    if changed:
        raise RecipeError(
            f"{folder} holds images made with another {', another '.join(changed)}: choose another out, or remove them."
        )
    try:
        budgets = [BudgetResult.model_validate(budget) for budget in content["budgets"]]
    except (ValidationError, KeyError, TypeError):  # written by another version: only the costs of its images are lost
        budgets = []
    return {budget.tail_drop: budget for budget in budgets}
