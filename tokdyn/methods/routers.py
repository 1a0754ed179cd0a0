"""Routers: modules that compute a boundary logit for every cell of a 2-D token map. Its sigmoid is the probability p.

Every router adds one scalar `bias` to its logits, so that it can be calibrated to keep 1/N of a batch (`calibrate`).
Routers compute in fp32 whatever the dtype of the model, because decisions near p = 0.5 would flip in bf16.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokdyn.division import current
from tokdyn.draws import integers
from tokdyn.errors import InputError
from tokdyn.methods.layers import Conv2d, GroupNorm, Linear
from tokdyn.ops.dropping import mix
from tokdyn.seeds import Draw

RouterName = Literal["spatial_predictability", "cosine", "random"]


def build_router(name: RouterName, width: int, target: float) -> Router:
    """Build a router.

    Args:
        name: the name of the router.
        width: D.
        target: N, cells per kept token; only the random router uses it.
    """
    if name == "spatial_predictability":
        return SpatialPredictabilityRouter(width)
    if name == "cosine":
        return CosineRouter(width)
    return RandomRouter(target)


class Router(nn.Module, ABC):
    """The base class of routers."""

    @property
    @abstractmethod
    def bias(self) -> nn.Parameter:
        """The scalar that is added to every logit, as a parameter of shape (1,)."""

    @abstractmethod
    def forward(self, tokens: Tensor, timestep: Tensor, frames: int = 1) -> Tensor:
        """Compute boundary logits; cells with a logit above 0 are kept.

        Args:
            tokens: (B F, D, R, C) fp32 or fp64, in any memory format; the frames of a sample are consecutive.
            timestep: (B,), from 0 to 1000, pure noise.
            frames: F, frames of each sample.

        Returns:
            (B F, R, C) logits.
        """

    @torch.no_grad()
    def calibrate(self, logits: Tensor, target: float) -> None:
        """Shift the bias in place so that 1/target of these logits would be above 0.

        NaN and infinite logits, as a damaged image in a batch has, are left out.

        Args:
            logits: logits of any shape, computed with the current bias.
            target: N, cells per kept token.

        Raises:
            InputError: no more than half of the logits are finite.
        """
        finite = logits[torch.isfinite(logits)].float()
        if 2 * finite.numel() <= logits.numel():
            raise InputError(
                "the router cannot be calibrated on this batch, for which it computes NaN or infinity; give finite "
                "inputs, and weights that are finite."
            )
        kept = max(1, round(finite.numel() / target))
        ranked = finite.sort(descending=True).values
        threshold = ranked[kept - 1 : kept + 1].mean()  # between the last kept and the first dropped
        self.bias.sub_(threshold.to(self.bias))


class SpatialPredictabilityRouter(Router):
    """The router of arXiv 2603.06351 v2, which keeps tokens that their neighbourhood predicts badly.

    With `z = conv1x1(x)` and the prediction error `r = z - conv3x3(z)`, the logit is
    `conv1x1(SiLU(GroupNorm(conv3x3(r))))`.

    Args:
        width: D.
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
        """The bias of the last convolution, (1,)."""
        return self.score[3].bias  # type: ignore[return-value]

    def forward(self, tokens: Tensor, timestep: Tensor, frames: int = 1) -> Tensor:
        """Compute logits (B F, R, C) from tokens (B F, D, R, C); the timestep is not used."""
        latent = self.proj(tokens)
        logits: Tensor = self.score(latent - self.context(latent))
        return logits.squeeze(1)


class CosineRouter(Router):
    """The router of arXiv 2603.06351 v1, for which no code was published.

    The probability is `p = (1 - cos(W_q x, mean of W_k x over the 8 neighbours)) / 2`. The mean is padded with zeros;
    since the cosine ignores its length, a border cell is compared with the mean of the neighbours that it has. The bias
    is added to logit(p); at 0 this is the published formula.

    Args:
        width: D.
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
        """Initialise the projections as identities and the mean as a uniform one over the eight neighbours."""
        nn.init.eye_(self.query.weight)
        nn.init.eye_(self.key.weight)
        self.neighbours.weight.fill_(1 / 8)
        self.neighbours.weight[:, :, 1, 1] = 0

    @property
    def bias(self) -> nn.Parameter:
        """The scalar added to logit(p), (1,)."""
        return self.offset

    def forward(self, tokens: Tensor, timestep: Tensor, frames: int = 1) -> Tensor:
        """Compute logits (B F, R, C) from tokens (B F, D, R, C); the timestep is not used."""
        rows = tokens.permute(0, 2, 3, 1)
        query = F.normalize(self.query(rows), dim=-1)
        key = F.normalize(self.key(rows), dim=-1).permute(0, 3, 1, 2)
        mean = F.normalize(self.neighbours(key), dim=1).permute(0, 2, 3, 1)
        cosine = (query * mean).sum(dim=-1)
        return torch.logit((1 - cosine) / 2, eps=1e-6) + self.offset.to(cosine)


class RandomRouter(Router):
    """A router that keeps 1/N of the cells at random, for the ablation in arXiv 2603.06351. It has no trained weights.

    In training mode each sample draws its noise, in a training run from its own key. In evaluation mode it is a hash of
    cell and timestep, so that the result depends neither on the other samples of the batch nor on the generator.

    Args:
        target: N, more than 1.
    """

    def __init__(self, target: float) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor([-math.log(target - 1)]), requires_grad=False)

    @property
    def bias(self) -> nn.Parameter:
        """The scalar `-log(N - 1)`, (1,): added to the logit of a uniform number, it leaves 1/N of them above 0."""
        return self.offset

    def calibrate(self, logits: Tensor, target: float) -> None:
        """Set the bias to `-log(N - 1)`, whatever the logits are."""
        nn.init.constant_(self.offset, -math.log(target - 1))

    def forward(self, tokens: Tensor, timestep: Tensor, frames: int = 1) -> Tensor:
        """Draw logits (B F, R, C) for tokens (B F, D, R, C), of which only the shape matters."""
        _, _, rows, columns = tokens.shape
        batch = len(tokens) // frames
        part = current()
        if not self.training:
            seed = (timestep.double() * 64).round().long().expand(batch)[:, None]
        elif part is not None:
            seed = integers(part.keys, 1, 2**31, Draw.ROUTER)
        else:
            seed = torch.randint(2**31, (batch, 1), device=tokens.device)
        cell = torch.arange(frames * rows * columns, device=tokens.device)
        uniform = (mix(mix(seed) + cell).double() + 0.5) / 2**32
        return (torch.logit(uniform).to(tokens) + self.offset.to(tokens)).view(-1, rows, columns)
