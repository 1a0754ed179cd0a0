"""Small networks whose outputs are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tokdyn.diffusion.objective import Objective


class GaussianOracle(nn.Module):
    """The optimal network for images whose pixels are independent N(mean, std^2), whatever the label.

    The second half of its output, if any, is ``spread`` everywhere: -1 for the smallest reverse variance, 1 for the
    largest. Labels other than 0 shift its mean by ``shift`` each.
    """

    def __init__(self, objective: Objective, mean: float, std: float, size: int, spread: float, shift: float) -> None:
        super().__init__()
        self.objective, self.mean, self.std, self.spread, self.shift = objective, mean, std, spread, shift
        self.weight = nn.Parameter(torch.zeros(()))
        self.config = {"in_channels": 1, "sample_size": size, "num_classes": 2}
        self.calls: list[int] = []

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        self.calls.append(len(x))
        alpha, sigma = (scale.to(x.dtype).view(-1, 1, 1, 1) for scale in self.objective.scales(timestep))
        mean = self.mean + self.shift * class_labels.to(x.dtype).view(-1, 1, 1, 1)
        surprise = (x - alpha * mean) / (alpha**2 * self.std**2 + sigma**2)
        noise, x0 = sigma * surprise, mean + alpha * self.std**2 * surprise
        output = noise - x0 if self.objective.kind == "flow" else noise
        if self.objective.learn_sigma:
            output = torch.cat([output, torch.full_like(output, self.spread)], dim=1)
        return SimpleNamespace(sample=output)


@dataclass(frozen=True)
class Routing:
    keep: Tensor
    kept: Tensor


class Routed(nn.Module):
    """A nonlinear network that computes kept cells only, called like DCDiT."""

    def __init__(self, learn_sigma: bool, channels: int = 4) -> None:
        super().__init__()
        self.config = {"in_channels": channels, "sample_size": (6, 4), "num_classes": 5}
        self.router = nn.Conv2d(channels, 1, 3, padding=1)
        self.inner = nn.Conv2d(channels, channels * (1 + learn_sigma), 3, padding=1)
        self.labels = nn.Embedding(6, channels)
        self.drops: list[float | Tensor] = []

    def forward(
        self, x: Tensor, timestep: Tensor, class_labels: Tensor, tail_drop: float | Tensor = 0.0
    ) -> SimpleNamespace:
        self.drops.append(tail_drop)
        x = x + self.labels(class_labels)[..., None, None] + timestep.view(-1, 1, 1, 1).to(x.dtype) / 1000
        probability = self.router(x).sigmoid().flatten(1)
        drop = torch.as_tensor(tail_drop).expand(len(x))
        natural = probability > 0.5
        rank = probability.where(natural, 2.0).argsort(1).argsort(1)
        keep = natural & (rank >= (natural.sum(1) * drop).floor().view(-1, 1))
        out = self.inner(torch.tanh(x) * keep.view(-1, 1, *x.shape[2:]))
        return SimpleNamespace(sample=out, routing=Routing(keep, keep.sum(1)))


@pytest.fixture
def oracle() -> Callable[..., GaussianOracle]:
    """Return a function that builds the optimal network for N(mean, std^2)."""

    def build(
        objective: Objective,
        mean: float = 0.3,
        std: float = 0.5,
        size: int = 32,
        spread: float = 0.0,
        shift: float = 0.0,
    ) -> GaussianOracle:
        return GaussianOracle(objective, mean, std, size, spread, shift)

    return build


@pytest.fixture
def routed() -> Callable[..., Routed]:
    """Return a function that builds a small network with routing."""

    def build(learn_sigma: bool = True, channels: int = 4) -> Routed:
        torch.manual_seed(11)
        return Routed(learn_sigma, channels)

    return build
