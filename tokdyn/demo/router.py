"""Score the decisions of a router against the ground truth of the procedural shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tokdyn.data import DetailScore, ShapesDataset, detail_area, detail_score, detail_shares
from tokdyn.diffusion.objective import Noised, Objective
from tokdyn.seeds import noise_generator
from tokdyn.tokens import Routing


@dataclass(frozen=True)
class RouterScore:
    """The score of a router at one noise level.

    Attributes:
        level: noise level of the images, in [0, 1].
        detail: score of the kept tokens.
        area: area under the ROC curve of the boundary probabilities; 0.5 for a random router.
        best_area: the largest area that scores of tokens of this size can have.
    """

    level: float
    detail: DetailScore
    area: float
    best_area: float


def score_router(
    model: Any, objective: Objective, data: ShapesDataset, indices: Sequence[int], level: float, seed: int = 0
) -> RouterScore:
    """Compare the decisions of a router with the detail of the shapes: the kept tokens, and their probabilities.

    Args:
        model: a `DCDiT` that was trained on procedural shapes.
        objective: objective that the model was trained with.
        data: the shapes.
        indices: indices of B images.
        level: noise level in [0, 1]; the nearest one that the objective has is used.
        seed: seed of the noise.

    Returns:
        The mean score of the B images.
    """
    routing, noised = route_noisy_shapes(model, objective, data, indices, level, seed)
    rows, columns = routing.grid
    grid, masks = (rows, columns), data.detail_masks(indices)
    return RouterScore(
        level=float(noised.level[0]),
        detail=detail_score(routing.keep.cpu(), grid, masks),
        area=detail_area(routing.probability.cpu(), grid, masks),
        best_area=detail_area(detail_shares(grid, masks), grid, masks),
    )


def route_noisy_shapes(
    model: Any, objective: Objective, data: ShapesDataset, indices: Sequence[int], level: float, seed: int
) -> tuple[Routing, Noised]:
    """Call a chunking model on noisy shapes.

    Args:
        model: a `DCDiT`; it runs in evaluation mode, and is then put back into its former mode.
        objective: objective that the model was trained with.
        data: the shapes.
        indices: indices of B images.
        level: noise level in [0, 1]; the nearest one that the objective has is used.
        seed: seed of the noise.

    Returns:
        The model's routing, and the noisy images.
    """
    device = next(model.parameters()).device
    images, labels = data.batch(indices)
    timesteps = torch.arange(objective.num_train_timesteps)
    nearest = timesteps[(objective.level(timesteps) - level).abs().argmin()]
    noise = torch.randn(images.shape, generator=noise_generator(seed))
    noised = objective.mix(images, noise, nearest.expand(len(images)))
    training = model.training
    model.eval()
    with torch.inference_mode():
        out = model(noised.x_t.to(device), timestep=noised.timestep.to(device), class_labels=labels.to(device))
    model.train(training)
    return out.routing, noised
