"""A small classifier of the procedural shapes, trained in a minute, that says which classes generated images show."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.data import ShapesDataset
from tokdyn.progress import progress

UNSEEN = 1_000_000
"""Index of the first image that no training and no judge has seen."""


class ShapeJudge(nn.Module):
    """Three convolutions and a linear layer, from images (B, 3, 32, 32) in [-1, 1] to logits (B, 10)."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 5, 2, 2), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, 1, 1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 128, 3, 1, 1), nn.BatchNorm2d(128), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
        )  # fmt: skip
        self.head = nn.Linear(128 * 16, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.layers(images).flatten(1))
        return logits


def train_judge(data: ShapesDataset, steps: int = 900, batch: int = 64, seed: int = 0) -> ShapeJudge:
    """Train a judge on the images that models are trained on.

    Args:
        data: the shapes.
        steps: optimizer steps.
        batch: images per step.
        seed: seed of the weights and of the order of the images.

    Returns:
        The judge, in evaluation mode.
    """
    torch.manual_seed(seed)
    judge = ShapeJudge(data.num_classes)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    with progress("judge", steps) as advance:
        for step in range(steps):
            indices = [order[(step * batch + place) % len(order)] for place in range(batch)]
            images, labels = data.batch(indices)
            # Noise of a few grey levels, so that the judge does not look at what a generator cannot draw exactly.
            loss = F.cross_entropy(judge(images + 0.05 * torch.randn_like(images)), labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            advance(1)
    return judge.eval()


def accuracy(judge: ShapeJudge, images: Tensor, labels: Tensor) -> Tensor:
    """Return for each image (B, 3, H, W) whether the judge recognises its class, (B,) bool."""
    with torch.inference_mode():
        return judge(images).argmax(dim=1) == labels


def score_judge(judge: ShapeJudge, data: ShapesDataset, count: int = 2000) -> float:
    """Return the accuracy of a judge on images that nobody was trained on."""
    images, labels = data.batch(range(UNSEEN, UNSEEN + count))
    return float(accuracy(judge, images, labels).double().mean())


def summary(found: Tensor, labels: Tensor, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the accuracy over all images and of each class by name."""
    per_class = {name: float(found[labels == number].double().mean()) for number, name in enumerate(names)}
    return {"accuracy": float(found.double().mean()), "per_class": per_class}
