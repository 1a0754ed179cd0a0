"""Learned chunking: keep the tokens a router asks for, run the blocks on them, spread the result over the grid.

Source: Dynamic Chunking Diffusion Transformer, arXiv 2603.06351.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tokdyn.methods.base import Method, Stage, Traits
from tokdyn.methods.routers import RouterName, build_router
from tokdyn.ops import dechunk_packed, exact, pack, ratio_loss, select, straight_through, tail_drop
from tokdyn.tokens import Grid, Packing, Routing


class Chunking(Method):
    """Settings of learned chunking.

    Attributes:
        target: N, tokens per kept token that the ratio loss holds.
        router: how boundary probabilities are computed.
        smoothing_sigma: width of the de-chunking kernel in cells; None skips the smoothing.
        force_ends: always keep the first and the last cell, as the official code does.
    """

    target: float = Field(default=4.0, gt=1.0)
    router: RouterName = "spatial_predictability"
    smoothing_sigma: float | None = Field(default=1.0, gt=0.0)
    force_ends: bool = False

    def traits(self, depth: int) -> Traits:
        """It owns the token grid; what the blocks see depends on the image."""
        return Traits(Stage.STACK, tokens="subset", moving=True, owns={"token grid": None}, learns="tokens")

    def build(self, width: int) -> ChunkingModule:
        """The trainable parts for tokens of the given width."""
        return ChunkingModule(self, width)


class ChunkingModule(nn.Module):
    """The router and the residual projection around a stretch of blocks.

    The residual projection starts at zero, so at the start the grid is exactly what de-chunking made of it.
    """

    def __init__(self, config: Chunking, width: int) -> None:
        super().__init__()
        self.config = config
        self.router = build_router(config.router, width, config.target)
        self.residual = nn.Linear(width, width)
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual.bias)

    def logits(self, tokens: Tensor, grid: Grid, timestep: Tensor) -> Tensor:
        """Boundary logits (B, N) of dense tokens (B, N, D) on a (rows, columns) grid."""
        with torch.autocast(tokens.device.type, enabled=False):
            rows = exact(tokens).view(len(tokens), *grid, -1).permute(0, 3, 1, 2)
            out: Tensor = self.router(rows, timestep)
            return out.flatten(1)

    def route(self, tokens: Tensor, grid: Grid, timestep: Tensor, drop: float | Tensor = 0.0) -> Routing:
        """Decide which tokens the blocks see.

        Args:
            tokens: (B, N, D).
            grid: (rows, columns).
            timestep: (B,).
            drop: tail drop, one fraction or (B,).

        Returns:
            The decision, with the ratio loss over the whole batch.
        """
        probability, natural = select(torch.sigmoid(self.logits(tokens, grid, timestep)), self.config.force_ends)
        keep = tail_drop(probability, natural, drop)
        loss = ratio_loss(probability, natural, self.config.target)
        return Routing(probability, keep, natural, grid, {"ratio": loss})

    def chunk(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Packing]:
        """Pack the kept tokens: (B, N, D) to (T, D) and the packing."""
        packing = pack(routing.keep, routing.grid)
        return tokens.reshape(-1, tokens.shape[-1]).index_select(0, packing.index), packing

    def dechunk(self, rows: Tensor, tokens: Tensor, routing: Routing, packing: Packing) -> Tensor:
        """Spread the blocks' output over the grid and add the residual.

        y = out * STE(p_sel) + W_res tokens, in fp32, p_sel = p where p > 0.5 and 1 - p elsewhere.

        Args:
            rows: (T, D), output of the blocks.
            tokens: (B, N, D), what was chunked.
            routing: the decision.
            packing: where the rows belong.

        Returns:
            (B, N, D), the tokens' type.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            source = exact(tokens)
            residual = F.linear(source, self.residual.weight.to(source), self.residual.bias.to(source))
            sigma = self.config.smoothing_sigma
            out = exact(dechunk_packed(rows, routing.probability, routing.keep, packing, sigma))
            if torch.is_grad_enabled():
                p = routing.probability
                chosen = torch.where(routing.natural_keep, p, 1 - p)
                out = straight_through(out, chosen)
            return (out + residual).to(tokens.dtype)
