"""Learned chunking: keep the tokens that a router selects, run the blocks on them, and restore the grid.

Dynamic Chunking Diffusion Transformer, arXiv 2603.06351.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tokdyn.errors import InputError
from tokdyn.method_names import ALIASES
from tokdyn.methods.base import Method, Sizes, Stage, Traits
from tokdyn.methods.layers import Linear
from tokdyn.methods.registry import register_method
from tokdyn.methods.routers import RouterName, build_router
from tokdyn.ops import dechunk_packed, exact, pack, ratio_loss, select, tail_drop
from tokdyn.ops.schedules import Curve, check_curve
from tokdyn.section import Divisor
from tokdyn.tokens import Grid, Packing, Routing


@register_method
class Chunking(Method):
    """Settings of learned chunking.

    A router computes a boundary probability p for every cell. By default the 1/N most probable tokens of every sample
    are kept: with the same number for all samples, every attention kernel works, and no mask is needed. With `ragged`
    the tokens with p > 0.5 are kept.

    Attributes:
        target: N, cells per kept token, at which the ratio loss holds the router; 1 keeps all tokens and has no effect.
        router: the kind of router.
        sigma: standard deviation, in cells, of the Gaussian that smooths the result over the grid; None leaves the
            smoothing out.
        tail_drop: share of the kept tokens to drop as well, least probable first, or points (noise level, share) that
            are interpolated. `tokdyn.set_tail_drop` replaces it for the following calls.
        ragged: keep the tokens with p > 0.5, as many as there are. Samples with different numbers of tokens are then
            computed separately.
        force_ends: always keep the first and the last cell, as the official code does.
        loss_weight: weight of the ratio loss.
    """

    aliases: ClassVar[tuple[str, ...]] = ALIASES["Chunking"]

    target: float = Field(default=4.0, ge=1.0)
    router: RouterName = "spatial_predictability"
    sigma: Divisor | None = 1.0
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
        """Return the traits: the method decides which tokens all blocks get, by image and noise level."""
        return Traits(
            Stage.BLOCKS,
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
            short="that is less than one token; raise the target",
        )

    def build(self, sizes: Sizes) -> ChunkingModule | None:
        """Build the router and the residual projection; None if the target is 1, which keeps all tokens."""
        return None if self.target == 1.0 else ChunkingModule(self, sizes.width)


class ChunkingModule(nn.Module):
    """The router and the residual projection around consecutive blocks, and what is computed with them.

    The residual projection starts at zero, so that at first it adds nothing to the de-chunked grid.

    Args:
        config: the settings.
        width: D.
    """

    def __init__(self, config: Chunking, width: int) -> None:
        super().__init__()
        self.config = config
        self.router = build_router(config.router, width, config.target)
        self.residual = Linear(width, width)
        nn.init.zeros_(self.residual.weight)
        nn.init.zeros_(self.residual.bias)

    def logits(self, tokens: Tensor, grid: Grid, timestep: Tensor) -> Tensor:
        """Compute boundary logits (B, N) of dense tokens (B, N, D) on a grid, for each frame of a video separately."""
        with torch.autocast(tokens.device.type, enabled=False):
            *frames, rows, columns = (1, *grid) if len(grid) == 1 else grid
            count = math.prod(frames)
            maps = exact(tokens).reshape(len(tokens) * count, rows, columns, -1).permute(0, 3, 1, 2)
            out: Tensor = self.router(maps, timestep, count)
            return out.reshape(len(tokens), -1)

    def route(
        self, tokens: Tensor, grid: Grid, timestep: Tensor, drop: float | Tensor = 0.0, plan: Tensor | None = None
    ) -> Routing:
        """Decide which tokens to keep: those with p > 0.5 or those of a plan, without the tail drop.

        Args:
            tokens: (B, N, D).
            grid: (rows, columns), N cells.
            timestep: (B,), from 0 to 1000, pure noise.
            drop: tail drop, one share or (B,).
            plan: (B, N) bool, the tokens to keep before tail drop, for each sample in which any is set. Probabilities
                and the ratio loss are those of the router in any case.

        Returns:
            The decision, with the ratio loss over the whole batch.

        Raises:
            InputError: the plan has another shape or dtype.
        """
        if plan is not None and (plan.shape != tokens.shape[:2] or plan.dtype != torch.bool):
            raise InputError(
                f"the plan is {plan.dtype} of shape {tuple(plan.shape)}; give a boolean tensor of shape "
                f"{tuple(tokens.shape[:2])}, "
                "with one entry for each token."
            )
        probability, natural = select(torch.sigmoid(self.logits(tokens, grid, timestep)), self.config.force_ends)
        selected = natural if plan is None else torch.where(plan.any(dim=1, keepdim=True), plan, natural)
        keep = tail_drop(probability, selected, drop)
        loss = ratio_loss(probability, natural, self.config.target)
        decided = None if plan is None else selected
        return Routing(probability, keep, natural, grid, {"ratio": loss}, decided)

    def chunk(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Packing]:
        """Pack the kept tokens (B, N, D) into rows (T, D), sample after sample; return the rows and their packing."""
        packing = pack(routing.keep, routing.grid)
        return tokens.reshape(-1, tokens.shape[-1]).index_select(0, packing.index), packing

    def dechunk(
        self, rows: Tensor, tokens: Tensor, routing: Routing, packing: Packing, dtype: torch.dtype | None = None
    ) -> Tensor:
        """De-chunk: give every cell the smoothed output of its nearest kept token, and add the residual projection.

        With `out` these outputs (B, N, D), the result is `out * STE(p_sel) + W_res tokens`, in fp32. p_sel is p for
        tokens that were selected before tail drop and 1 - p for others; STE(p_sel) is 1 with the gradient of p_sel.

        Args:
            rows: (T, D), output of the blocks.
            tokens: (B, N, D), the tokens before chunking.
            routing: the decision.
            packing: the packing of the rows.
            dtype: dtype of the result; None for that of `tokens`.

        Returns:
            (B, N, D).
        """
        with torch.autocast(tokens.device.type, enabled=False):
            residual: Tensor = self.residual(exact(tokens))
            p = routing.probability
            decided = routing.natural_keep if routing.decided is None else routing.decided
            p_sel = torch.where(decided, p, 1 - p) if torch.is_grad_enabled() else None
            return dechunk_packed(
                exact(rows), p, routing.keep, packing, self.config.sigma, p_sel, residual, dtype or tokens.dtype
            )
