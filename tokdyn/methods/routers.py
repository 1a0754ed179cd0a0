"""Routers: modules that give every cell of a 2-D token map a boundary logit; p = sigmoid(logit).

Every router ends in one additive `bias`, so every router can be calibrated to keep 1/N of a batch (see `calibrate`).
They compute in fp32 whatever the model's type, because decisions near p = 0.5 flip in bf16.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.methods.layers import Conv2d, GroupNorm, Linear
from tokdyn.ops.dropping import mix

RouterName = Literal["spatial_predictability", "cosine", "random"]


def build_router(name: RouterName, width: int, target: float) -> Router:
    """The router of that name for tokens of the given width."""
    if name == "spatial_predictability":
        return SpatialPredictabilityRouter(width)
    if name == "cosine":
        return CosineRouter(width)
    return RandomRouter(target)


class Router(nn.Module, ABC):
    """Boundary logits of a token map."""

    @property
    @abstractmethod
    def bias(self) -> nn.Parameter:
        """The additive bias of the logit, one number."""

    @abstractmethod
    def forward(self, tokens: Tensor, timestep: Tensor, frames: int = 1) -> Tensor:
        """Logits (B F, R, C) of the F frames of tokens (B F, D, R, C), fp32 or fp64 in any layout; timestep (B,)."""

    @torch.no_grad()
    def calibrate(self, logits: Tensor, target: float) -> None:
        """Shift the bias so that 1/target of these logits are above 0.

        Args:
            logits: any shape, computed with the current bias.
            target: N, tokens per kept token.
        """
        kept = max(1, round(logits.numel() / target))
        ranked = logits.flatten().float().sort(descending=True).values
        threshold = ranked[kept - 1 : kept + 1].mean()  # between the last kept and the first dropped
        self.bias.sub_(threshold.to(self.bias))


class SpatialPredictabilityRouter(Router):
    """v2 of arXiv 2603.06351: a token is kept if its neighbourhood predicts it badly.

    z = conv1x1(x); r = z - conv3x3(z); logit = conv1x1(SiLU(GroupNorm(conv3x3(r)))).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(1, width // 4)
        self.proj = Conv2d(width, inner, 1)
        self.context = Conv2d(inner, inner, 3, padding=1)
        self.score = nn.Sequential(
            Conv2d(inner, inner, 3, padding=1),
            GroupNorm(math.gcd(8, inner), inner),
            nn.SiLU(),
            Conv2d(inner, 1, 1),
        )
        nn.init.constant_(self.bias, -1.1)

    @property
    def bias(self) -> nn.Parameter:
        """The bias of the last convolution."""
        return self.score[3].bias  # type: ignore[return-value]

    def forward(self, tokens: Tensor, timestep: Tensor, frames: int = 1) -> Tensor:
        """Logits (B F, R, C) of tokens (B F, D, R, C)."""
        latent = self.proj(tokens)
        logits: Tensor = self.score(latent - self.context(latent))
        return logits.squeeze(1)


class CosineRouter(Router):
    """v1 of arXiv 2603.06351: p = (1 - cos(W_q x, mean of the neighbours' W_k x)) / 2.

    No public code exists. Padding is zero: the cosine ignores the length of the mean, so a border cell is compared
    with the mean of the neighbours it has. `bias` is added to logit(p), 0 being the formula as published.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = Linear(width, width, bias=False)
        self.key = Linear(width, width, bias=False)
        self.neighbours = Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.offset = nn.Parameter(torch.zeros(1))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Identity projections and a uniform average of the eight neighbours."""
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)
        self.neighbours.weight.fill_(1 / 8)
        self.neighbours.weight[:, :, 1, 1] = 0

    @property
    def bias(self) -> nn.Parameter:
        """The offset added to logit(p)."""
        return self.offset

    def forward(self, tokens: Tensor, timestep: Tensor, frames: int = 1) -> Tensor:
        """Logits (B F, R, C) of tokens (B F, D, R, C)."""
        rows = tokens.permute(0, 2, 3, 1)
        query = F.normalize(self.query(rows), dim=-1)
        key = F.normalize(self.key(rows), dim=-1).permute(0, 3, 1, 2)
        around = F.normalize(self.neighbours(key), dim=1).permute(0, 2, 3, 1)
        cosine = (query * around).sum(dim=-1)
        return torch.logit((1 - cosine) / 2, eps=1e-6) + self.offset.to(cosine)


class RandomRouter(Router):
    """The paper's ablation: boundaries at random, 1/N of the cells in expectation; nothing is learned.

    While training, each sample draws its own noise from torch's generator. In evaluation the noise is a hash of cell
    and timestep, so a sample depends on neither its batch mates nor the generator.
    """

    def __init__(self, target: float) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor([-math.log(target - 1)]), requires_grad=False)

    @property
    def bias(self) -> nn.Parameter:
        """Minus log(N - 1): the logit of a uniform number exceeds it with probability 1/N."""
        return self.offset

    def calibrate(self, logits: Tensor, target: float) -> None:
        """Set the exact bias; the logits do not matter."""
        nn.init.constant_(self.offset, -math.log(target - 1))

    def forward(self, tokens: Tensor, timestep: Tensor, frames: int = 1) -> Tensor:
        """Logits (B F, R, C) for tokens (B F, D, R, C)."""
        _, _, rows, columns = tokens.shape
        batch = len(tokens) // frames
        if self.training:
            seed = torch.randint(2**31, (batch, 1), device=tokens.device)
        else:
            seed = (timestep.double() * 64).round().long().expand(batch)[:, None]
        cell = torch.arange(frames * rows * columns, device=tokens.device)
        uniform = (mix(mix(seed) + cell).double() + 0.5) / 2**32
        return (torch.logit(uniform).to(tokens) + self.offset.to(tokens)).view(-1, rows, columns)
