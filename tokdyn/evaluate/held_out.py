"""Measure the diffusion loss on held-out images by noise level, with the same noise for every model.

Held-out images are images that the model was not trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import reduce
from torch import Tensor

from tokdyn.data import Dataset
from tokdyn.data.hashing import Purpose, generators
from tokdyn.diffusion.guidance import takes_tail_drop
from tokdyn.diffusion.objective import Objective
from tokdyn.errors import InputError
from tokdyn.ops.schedules import Curve, at
from tokdyn.progress import progress
from tokdyn.team import ALONE, Team


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss of a model on held-out images.

    Attributes:
        loss: mean squared error of the predicted noise (or velocity, for a flow) over images and noise levels, without
            the variational bound.
        spread: standard error of `loss` over the images.
        levels: middle of each bin of noise levels; level 0 is the clean image.
        by_level: mean loss in each bin; None for an empty bin.
        kept: mean kept share; None for a model that computes every token.
        images: number of images used.
    """

    loss: float
    spread: float
    levels: tuple[float, ...]
    by_level: tuple[float | None, ...]
    kept: float | None
    images: int


def held_out_loss(
    model: Any,
    objective: Objective,
    dataset: Dataset,
    *,
    images: int = 2000,
    repeats: int = 1,
    batch_size: int = 100,
    tail_drop: Curve = 0.0,
    bins: int = 10,
    seed: int = 0,
    team: Team = ALONE,
) -> HeldOutLoss:
    """Compute the loss of a model on held-out images, with timesteps and noise that depend on the seed alone.

    The timesteps are stratified, so that means over few images can be compared: their range is divided into M equal
    parts, one for each image at random, and each image gets a random timestep from its part.

    Args:
        model: a `DiT` or `DCDiT`, wrapped or not. It runs in evaluation mode on the device of its weights, and is then
            put back into its former mode.
        objective: the objective that the model was trained with.
        dataset: images that the model was not trained on.
        images: M, the number of images to use, spread evenly over the dataset; all if there are fewer.
        repeats: number of timesteps and noises per image; the r-th are those of `repeats=1` with seed + r, from r = 0.
        batch_size: images per call of the model.
        tail_drop: tail drop of a model that takes one: a number, or points (noise level, share) to interpolate between.
            Other models ignore it.
        bins: number of bins of noise levels.
        seed: seed of timesteps and noise.
        team: processes that call this function with the same arguments, each of which computes a share of the batches.
            The result is that of one process, in all of them.

    Raises:
        InputError: there are fewer than two images.
    """
    count = min(images, len(dataset))
    if count < 2:
        raise InputError(
            f"A held-out loss needs at least 2 images, got {count} (images={images}, {len(dataset)} in the data set): "
            "raise images, or give more data."
        )
    indices = [index * len(dataset) // count for index in range(count)]
    device = next(model.parameters()).device
    routes = takes_tail_drop(model)
    parts = [(repeat, start) for repeat in range(repeats) for start in range(0, count, batch_size)]
    mine = team.share(parts)
    rows, training = [], model.training
    model.eval()
    try:
        with torch.inference_mode(), progress("held-out loss", len(mine)) as advance:
            for repeat, start in mine:
                times = _times(count, seed + repeat)
                part = indices[start : start + batch_size]
                x, labels = dataset.batch(part)
                noise = _noise(seed + repeat, part, x.shape[1:])
                timesteps = _timesteps(objective, times[start : start + batch_size])
                noised = objective.mix(x.to(device), noise.to(device), timesteps.to(device))
                options = {"tail_drop": _tail_drops(tail_drop, noised.level)} if routes else {}
                out = model(noised.x_t, timestep=noised.timestep, class_labels=labels.to(device), **options)
                columns = [_error(objective, out.sample, noised), noised.level]
                if getattr(out, "routing", None) is not None:
                    columns.append(out.routing.kept.float() / out.routing.keep.shape[1])
                rows.append(torch.stack([column.cpu() for column in columns], dim=1).tolist())
                advance(1)
    finally:
        model.train(training)
    told = team.in_order(team.exchange(rows))
    losses, levels, *kept = torch.tensor([row for part in told for row in part]).T
    return _result(losses, levels, kept[0] if kept else None, bins, count, repeats)


def _times(count: int, seed: int) -> Tensor:
    """Draw where in the range of timesteps, from 0 to 1, each of M images is (M,): one in each of M equal parts."""
    (generator,) = generators(seed, Purpose.HELD_OUT)
    order = torch.randperm(count, generator=generator)
    return (order + torch.rand(count, generator=generator)) / count


def _tail_drops(curve: Curve, levels: Tensor) -> float | Tensor:
    """Return the tail drop as a number, or as a tensor (B,) if it depends on the noise levels (B,)."""
    if isinstance(curve, int | float):
        return curve
    return torch.tensor([at(curve, level) for level in levels.tolist()], device=levels.device)


def _noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Draw noise (B, *shape); the noise of each of the B images depends on the seed and on its index alone."""
    return torch.stack(
        [torch.randn(tuple(shape), generator=own) for own in generators(seed, Purpose.HELD_OUT, np.asarray(indices))]
    )


def _timesteps(objective: Objective, share: Tensor) -> Tensor:
    """Return the timesteps (B,) at the given positions (B,), from 0 to 1, in the range of the objective's timesteps."""
    timesteps = share * objective.num_train_timesteps
    return timesteps if objective.kind == "flow" else timesteps.long().clamp(max=objective.num_train_timesteps - 1)


def _error(objective: Objective, output: Tensor, noised: Any) -> Tensor:
    """Return the mean squared error (B,) of the predicted noise, or of the predicted velocity for a flow."""
    prediction, _ = objective.split(output, noised.x0.shape[1])
    target = noised.noise if objective.kind == "noise" else noised.noise - noised.x0
    error: Tensor = (prediction - target).square().flatten(1).mean(dim=1)
    return error


def _result(losses: Tensor, levels: Tensor, kept: Tensor | None, bins: int, count: int, repeats: int) -> HeldOutLoss:
    """Compute the means from the losses, noise levels and kept shares of all images and repeats, (repeats * count,)."""
    per_image = reduce(losses, "(repeat image) -> image", "mean", image=count)
    place = (levels * bins).long().clamp(0, bins - 1)
    means = [losses[place == number] for number in range(bins)]
    return HeldOutLoss(
        loss=losses.mean().item(),
        spread=(per_image.std() / count**0.5).item(),
        levels=tuple((number + 0.5) / bins for number in range(bins)),
        by_level=tuple(part.mean().item() if len(part) else None for part in means),
        kept=None if kept is None else kept.mean().item(),
        images=count,
    )
