"""Sample grids and boundary maps during a training run, and false colours where no autoencoder is at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokdyn.diffusion.guidance import takes_tail_drop
from tokdyn.diffusion.sampling import Sampler, generate
from tokdyn.diffusion.schedulers import SchedulerName
from tokdyn.errors import DataError, RecipeError
from tokdyn.recipe import Recipe
from tokdyn.report.decoding import open_decoder
from tokdyn.report.grids import image_grid
from tokdyn.report.maps import MapRecorder, draw_maps
from tokdyn.report.pixels import Pixels, to_pixels, write_png

_STEPS = 25
_MAPPED = 4  # images in the picture of boundary maps
_LATENT_RANGE = 3.0  # scaled latents are about standard normal


def draw_preview(model: Any, recipe: Recipe, folder: Path, step: int) -> list[Path]:
    """Write `samples/step_X.png` and, for a chunking model, `maps/step_X.png`.

    Nothing of a run depends on it: the global random state and the model's mode are left as they are.

    Args:
        model: the averaged model, on its device.
        recipe: of the run; its `preview` section says what to draw.
        folder: of the run.
        step: optimizer steps taken.

    Returns:
        The files.
    """
    wanted, chunked = recipe.preview, takes_tail_drop(model)
    to_picture, latents, remark = _decoder(model, recipe)
    usual: SchedulerName = "euler" if recipe.objective.kind == "flow" else "ddim"
    sampler = wanted.sampler or Sampler(scheduler=usual, steps=_STEPS, clip=not latents)
    labels = [index % model.config.num_classes for index in range(wanted.images)]
    seeds = [wanted.seed + index for index in range(wanted.images)]
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else None
    name, title = f"step_{step:07d}.png", f"{recipe.name}, step {step:,}{remark}"
    drops = wanted.tail_drops if chunked else (0.0,)
    files, rows = [], []
    for number, drop in enumerate(drops):
        budget = sampler.model_copy(update={"tail_drop": drop}) if chunked else sampler
        recorder = MapRecorder(budget.steps, _MAPPED) if chunked and wanted.maps and number == 0 else None
        made = generate(model, budget, recipe.objective, labels, seeds, callback=recorder, dtype=dtype)
        pixels = to_picture(made.images)
        rows.append(pixels)
        if recorder is not None:
            shown = [str(label) for label in labels[:_MAPPED]]
            path = folder / "maps" / name
            files.append(draw_maps(recorder.maps(), pixels[:_MAPPED], to_picture, path, shown, f"{title}: tokens kept"))
    captions = [str(label) for label in labels]
    if len(rows) == 1:
        page = image_grid(rows[0], captions=captions, title=title)
    else:
        titles = [f"tail drop {drop:g}" for drop in drops]
        page = image_grid(np.concatenate(rows), len(labels), row_titles=titles, column_titles=captions, title=title)
    return [write_png(page, folder / "samples" / name), *files]


def _decoder(model: Any, recipe: Recipe) -> tuple[Callable[[Tensor], Pixels], bool, str]:
    """What makes pictures of samples, whether they are latents, and what to say in the title.

    A run must not end because the autoencoder of its latents is out of reach, so those are then shown as they are.
    """
    try:
        decoder = open_decoder(model.config.in_channels, recipe.data, None, next(model.parameters()).device)
    except (DataError, RecipeError):
        return (lambda latents: to_pixels(latents / _LATENT_RANGE)), True, " (latents in false colours)"
    return decoder, decoder.latents, ""
