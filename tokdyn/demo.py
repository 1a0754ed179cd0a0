"""The tour behind `tokdyn demo`: train a small DC-DiT on procedural shapes, sample it at three budgets, look inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.data.shapes import ShapesDataset
from tokdyn.diffusion.objective import Objective


@dataclass(frozen=True)
class RouterScore:
    """How well the tokens that a router keeps match where the detail of an image is.

    Attributes:
        level: noise level in [0, 1] of the images that the router saw.
        kept: share of the tokens that were kept.
        detail: share of the tokens that lie on detail; a random router's precision.
        precision: share of the kept tokens that lie on detail.
        recall: share of the tokens on detail that were kept.
        auc: chance that a token on detail has a higher probability than one that is not; 0.5 for a random router.
    """

    level: float
    kept: float
    detail: float
    precision: float
    recall: float
    auc: float


def score_router(
    model: Any, objective: Objective, data: ShapesDataset, indices: Sequence[int], level: float, seed: int = 0
) -> RouterScore:
    """Compare what a chunking model keeps with the ground truth of the shapes.

    Args:
        model: a `DCDiT` trained on such shapes.
        objective: what it was trained with.
        data: the shapes.
        indices: B images to show it.
        level: noise level in [0, 1]; the nearest one that the objective has is used.
        seed: of the noise.

    Returns:
        The score over all B images.
    """
    device = next(model.parameters()).device
    images, labels = data.batch(indices)
    timesteps = torch.arange(objective.num_train_timesteps)
    nearest = timesteps[(objective.level(timesteps) - level).abs().argmin()]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    noised = objective.mix(images, noise, nearest.expand(len(images)))
    with torch.inference_mode():
        was_training = model.training
        routing = model.eval()(
            noised.x_t.to(device), timestep=noised.timestep.to(device), class_labels=labels.to(device)
        ).routing
        model.train(was_training)
    # A token lies on detail when at least half of its pixels do.
    detail = F.adaptive_avg_pool2d(data.detail_masks(indices).float()[:, None], routing.grid).flatten(1) >= 0.5
    keep, probability = routing.keep.cpu(), routing.probability.float().cpu()
    both = (keep & detail).sum().item()
    return RouterScore(
        level=float(noised.level[0]),
        kept=keep.float().mean().item(),
        detail=detail.float().mean().item(),
        precision=both / max(1, int(keep.sum())),
        recall=both / max(1, int(detail.sum())),
        auc=rank_auc(probability[detail], probability[~detail]),
    )


def rank_auc(inside: Tensor, outside: Tensor) -> float:
    """Chance that a random member of `inside` (n,) exceeds one of `outside` (m,); ties count half, nothing is 0.5."""
    if not len(inside) or not len(outside):
        return 0.5
    ranked = outside.sort().values
    below = torch.searchsorted(ranked, inside) + torch.searchsorted(ranked, inside, right=True)
    return float(below.double().mean()) / (2 * len(outside))
