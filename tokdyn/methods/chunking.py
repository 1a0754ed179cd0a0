"""Learned chunking: keep the tokens a router asks for, run the blocks on them, spread the result over the grid.

Source: Dynamic Chunking Diffusion Transformer, arXiv 2603.06351.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tokdyn.methods.base import Method, Sizes, Stage, Traits
from tokdyn.methods.layers import Linear
from tokdyn.methods.registry import register_method
from tokdyn.methods.routers import RouterName, build_router
from tokdyn.ops import dechunk_packed, exact, pack, ratio_loss, select, tail_drop
from tokdyn.ops.schedules import Curve, check_curve
from tokdyn.tokens import Grid, Packing, Routing


@register_method
class Chunking(Method):
    """Settings of learned chunking.

    In a model that was built without it, the same number of tokens is kept of every sample, the most probable ones, so
    that every attention kernel works and nothing is masked; `ragged` keeps those that the router asks for.

    Attributes:
        target: N, tokens per kept token that the ratio loss holds; 1 keeps all and changes nothing.
        router: how boundary probabilities are computed.
        sigma: width of the de-chunking kernel in cells; None skips the smoothing.
        tail_drop: share of the kept tokens to drop, least probable first, or points (noise level, share);
            `tokdyn.set_tail_drop` sets it from call to call.
        ragged: keep the tokens with p > 0.5, as many as there are; samples of different length are computed apart.
        force_ends: always keep the first and the last cell, as the official code does.
        loss_weight: of the ratio loss.
    """

    aliases: ClassVar[tuple[str, ...]] = ("dc",)

    target: float = Field(default=4.0, ge=1.0)
    router: RouterName = "spatial_predictability"
    sigma: float | None = Field(default=1.0, gt=0.0)
    tail_drop: Curve = 0.0
    ragged: bool = False
    force_ends: bool = False
    loss_weight: float = Field(default=0.03, ge=0.0)

    @field_validator("tail_drop")
    @classmethod
    def _shares(cls, tail_drop: Curve) -> Curve:
        check_curve(tail_drop, 0.0, 1.0)
        return tail_drop

    def traits(self, depth: int) -> Traits:
        """It owns the token grid; what the blocks see depends on the image."""
        return Traits(
            Stage.STACK,
            tokens="subset",
            moving=True,
            reads="grid",
            needs_level=True,  # routers are told the noise level
            owns={"token grid": None},
            learns="tokens",
            target=self.target,
            needs_sizes=True,
            diverges=self.ragged or not isinstance(self.tail_drop, float),
            controls=frozenset({"tail_drop", "calibrate_router"}),
        )

    def build(self, sizes: Sizes) -> ChunkingModule | None:
        """The router and the residual projection, unless all tokens are kept."""
        return None if self.target == 1.0 else ChunkingModule(self, sizes.width)


class ChunkingModule(nn.Module):
    """The router and the residual projection around a stretch of blocks.

    The residual projection starts at zero, so at the start the grid is exactly what de-chunking made of it.
    """

    def __init__(self, config: Chunking, width: int) -> None:
        super().__init__()
        self.config = config
        self.router = build_router(config.router, width, config.target)
        self.residual = Linear(width, width)
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual.bias)

    def logits(self, tokens: Tensor, grid: Grid, timestep: Tensor) -> Tensor:
        """Boundary logits (B, N) of dense tokens (B, N, D) on a grid; frames of a video are looked at one by one."""
        with torch.autocast(tokens.device.type, enabled=False):
            *frames, rows, columns = (1, *grid) if len(grid) == 1 else grid
            count = math.prod(frames)
            maps = exact(tokens).reshape(len(tokens) * count, rows, columns, -1).permute(0, 3, 1, 2)
            out: Tensor = self.router(maps, timestep, count)
            return out.reshape(len(tokens), -1)

    def route(
        self, tokens: Tensor, grid: Grid, timestep: Tensor, drop: float | Tensor = 0.0, plan: Tensor | None = None
    ) -> Routing:
        """Decide which tokens the blocks see.

        Args:
            tokens: (B, N, D).
            grid: (rows, columns).
            timestep: (B,).
            drop: tail drop, one fraction or (B,).
            plan: (B, N) bool, for samples where any is set the tokens to keep before tail drop. Probabilities, and the
                losses on them, stay the router's own.

        Returns:
            The decision, with the ratio loss over the whole batch.
        """
        probability, natural = select(torch.sigmoid(self.logits(tokens, grid, timestep)), self.config.force_ends)
        chosen = natural if plan is None else torch.where(plan.any(dim=1, keepdim=True), plan, natural)
        keep = tail_drop(probability, chosen, drop)
        loss = ratio_loss(probability, natural, self.config.target)
        decided = None if plan is None else chosen
        return Routing(probability, keep, natural, grid, {"ratio": loss}, decided)

    def chunk(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Packing]:
        """Pack the kept tokens: (B, N, D) to (T, D) and the packing."""
        packing = pack(routing.keep, routing.grid)
        return tokens.reshape(-1, tokens.shape[-1]).index_select(0, packing.index), packing

    def dechunk(
        self, rows: Tensor, tokens: Tensor, routing: Routing, packing: Packing, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Spread the blocks' output over the grid and add the residual.

        y = out * STE(p_sel) + W_res tokens, in fp32, p_sel = p where a token was chosen (p > 0.5, or by a
        plan) and 1 - p elsewhere.

        Args:
            rows: (T, D), output of the blocks.
            tokens: (B, N, D), what was chunked.
            routing: the decision.
            packing: where the rows belong.
            dtype: of the result, the tokens' by default.

        Returns:
            (B, N, D).
        """
        with torch.autocast(tokens.device.type, enabled=False):
            residual: Tensor = self.residual(exact(tokens))
            p = routing.probability
            decided = routing.natural_keep if routing.decided is None else routing.decided
            chosen = torch.where(decided, p, 1 - p) if torch.is_grad_enabled() else None
            return dechunk_packed(
                exact(rows), p, routing.keep, packing, self.config.sigma, chosen, residual, dtype or tokens.dtype
            )
