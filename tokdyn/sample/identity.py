"""Tells whether the images in a folder were made as they would be made now, so that only missing ones are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokdyn.data.vae import weights_digest
from tokdyn.errors import RecipeError
from tokdyn.sample.job import Job

RESULT = "sample.json"

_DECIDING = frozenset(
    {"seed", "steps", "guidance", "guidance_channels", "guidance_interval", "tail_drop", "uncond_tail_drop"}
    | {"class_folders"}
)


def identity(job: Job) -> dict[str, Any]:
    """What decides the images of a folder, as JSON data. The number of images and the batch size do not."""
    settings = job.config.model_dump(mode="json", include=set(_DECIDING))
    return settings | {
        "classes": list(job.classes),
        "scheduler": job.scheduler,
        "clip": job.clip,
        "precision": job.precision,
        "device": job.device.type if job.scheduler == "ddpm" else "any",  # see tokdyn.diffusion.randomness
        "objective": job.objective.model_dump(mode="json"),
        "weights": weights_digest(job.model),
        "vae": None if job.decoder.vae is None else weights_digest(job.decoder.vae),
    }


def refuse_other_images(folder: Path, now: dict[str, Any]) -> None:
    """Stop before new images are mixed with images that were made in another way.

    Args:
        folder: the ``out`` of the run.
        now: from `identity`.

    Raises:
        RecipeError: the folder holds such images, or images of unknown origin.
    """
    if not any(folder.rglob("images/**/*.png")):
        return
    try:
        earlier = json.loads((folder / RESULT).read_text(encoding="utf-8"))["identity"]
    except (OSError, ValueError, KeyError) as error:
        raise RecipeError(
            f"{folder} holds images, but no {RESULT} that says how they were made: choose another out"
        ) from error
    changed = [key for key, value in now.items() if earlier.get(key) != value]
    if changed:
        raise RecipeError(
            f"{folder} holds images made with another {', another '.join(changed)}: choose another out, or remove them"
        )
