"""Draw grids of samples and boundary maps during training, in false colours if no autoencoder is available."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokdyn.diffusion.guidance import takes_tail_drop
from tokdyn.diffusion.sampling import generate
from tokdyn.diffusion.settings import Sampler, SchedulerName
from tokdyn.errors import DataError, RecipeError
from tokdyn.recipe import Recipe
from tokdyn.report.decoding import open_decoder
from tokdyn.report.grids import image_grid
from tokdyn.report.maps import MapRecorder, draw_maps
from tokdyn.report.pixels import Pixels, to_pixels, write_png

_STEPS = 25
_MAPPED = 4  # images in the picture of boundary maps
_LATENT_RANGE = 3.0  # scaled latents are about standard normal, so most are in [-3, 3]


def draw_preview(model: Any, recipe: Recipe, folder: Path, step: int) -> list[Path]:
    """Sample the model, and write `samples/step_X.png` and, if it routes tokens, `maps/step_X.png`.

    Training is not affected: the global random state is not used, and the model's mode is restored.

    Args:
        model: the averaged model, on its device.
        recipe: recipe of the run; its section `preview` says what to draw.
        folder: folder of the run.
        step: number of optimizer steps taken.

    Returns:
        The paths of the files.
    """
    settings, routes = recipe.preview, takes_tail_drop(model)
    to_picture, latents, remark = _decoder(model, recipe)
    scheduler: SchedulerName = "euler" if recipe.objective.kind == "flow" else "ddim"
    sampler = settings.sampler or Sampler(scheduler=scheduler, steps=_STEPS, clip=not latents)
    labels = [index % model.config.num_classes for index in range(settings.images)]
    seeds = [settings.seed + index for index in range(settings.images)]
    dtype = torch.bfloat16 if recipe.training.precision == "bf16" else None
    name, title = f"step_{step:07d}.png", f"{recipe.name}, step {step:,}{remark}"
    drops = settings.tail_drops if routes else (0.0,)
    files, rows = [], []
    for number, drop in enumerate(drops):
        drop_sampler = sampler.model_copy(update={"tail_drop": drop}) if routes else sampler
        recorder = MapRecorder(drop_sampler.steps, _MAPPED) if routes and settings.maps and number == 0 else None
        generation = generate(model, drop_sampler, recipe.objective, labels, seeds, callback=recorder, dtype=dtype)
        pixels = to_picture(generation.images)
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
    """Return a function that converts samples to bytes, whether the samples are latents, and a remark for the title.

    If the autoencoder is not available, training must not stop, so latents are then drawn in false colours.
    """
    try:
        decoder = open_decoder(model.config.in_channels, recipe.data, None, next(model.parameters()).device)
    except (DataError, RecipeError):
        return (lambda latents: to_pixels(latents / _LATENT_RANGE)), True, " (latents in false colours)"
    return decoder, decoder.latents, ""
