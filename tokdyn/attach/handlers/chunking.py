"""The handler of Chunking: run all blocks on the tokens that a router keeps, and restore the full grid afterwards.

DC-DiT chunks its tokens itself. For that model, `call_chunked` applies tail drops and FeatureCache around its own code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.attach import class_swap
from tokdyn.attach.context import CallContext
from tokdyn.attach.handlers.base import BlockCall, Frame, Plan, Selector, handles
from tokdyn.attach.view import TokenView
from tokdyn.errors import InputError
from tokdyn.methods import Chunking, ChunkingModule
from tokdyn.methods.costs import residual_flops, router_flops, smoothing_flops
from tokdyn.ops import ratio_loss, select
from tokdyn.ops.dechunk import smooths_on_grid
from tokdyn.ops.dropping import take
from tokdyn.ops.pack import pack_index
from tokdyn.ops.routing import most_probable, tail_drop, tail_kept
from tokdyn.ops.schedules import Curve, at
from tokdyn.tokens import Grid, Routing
from tokdyn.trace.branches import BOTH, is_unconditional, split
from tokdyn.trace.calls import per_sample


@dataclass
class Chunked:
    """The state between the first and the last block.

    Attributes:
        start: (B, N, D) the tokens before the blocks.
        index: (B, M) int64 cells of the kept tokens.
        lengths: number of kept tokens of each sample.
        routing: the router's probabilities, and the tokens that it keeps before tail drop.
        view: the view of `start`.
    """

    start: Tensor
    index: Tensor
    lengths: tuple[int, ...]
    routing: Routing
    view: TokenView


@dataclass(eq=False)
class ChunkedBlocks(Selector):
    """Runs all blocks on the kept tokens only, and restores the full grid after the last block.

    De-chunking is applied to the change that the blocks made, output minus input: every cell gets its token from before
    the blocks plus the change of the kept token nearest to it on the grid. If all tokens are kept, smoothing is off and
    the residual projection still has its initial zeros, the output equals that of the model without Chunking.

    Attributes:
        method: the settings.
        module: the router and the residual projection.
        slot: slot of the state, a `Chunked` between the first and the last block.
    """

    method: Chunking
    module: ChunkingModule
    first: int
    last: int
    slot: int

    def selects(self, context: CallContext) -> bool:
        """Return whether the target lets tokens be left out."""
        return self.method.target != 1.0

    def open(self, frame: Frame, view: TokenView, x: Tensor, block: BlockCall) -> tuple[Tensor, TokenView]:
        """Keep the most probable tokens of each sample, (B, N, D) to (B, M, D); all of them if the target is 1.

        In training this adds the ratio loss. While `calibrate_router` runs, the router's bias is adjusted first.
        """
        if self.method.target == 1.0:
            return x, view
        context, (batch, count, width) = frame.context, x.shape
        context.trace.spend("Chunking router", batch * router_flops(self.method.router, count, width))
        timestep = 1000.0 * context.level_tensor(view, x.device).expand(batch)
        logits = self.module.logits(x, context.grid, timestep)
        if context.settings.calibrating:
            before = self.module.router.bias.detach().clone()
            self.module.router.calibrate(logits.detach(), self.method.target)
            logits = logits + (self.module.router.bias - before).to(logits)
        probability, natural = select(torch.sigmoid(logits), self.method.force_ends)
        drops = tail_drops(context, view, self.method.tail_drop)
        if self.method.ragged:
            keep = tail_drop(probability, natural, torch.tensor(drops, device=x.device))
            lengths = tuple(keep.sum(dim=1).tolist())
        else:
            kept = max(1, round(count / self.method.target))
            context.trace.fall_short("Chunking", (1.0 - 1.0 / self.method.target,), (count - kept,), (count,))
            lengths = tuple(tail_kept(kept, drop) for drop in drops)
        index = most_probable(probability, lengths)
        if context.training:
            loss = self.method.loss_weight * ratio_loss(probability, natural, self.method.target)
            context.add_loss("Chunking", loss)
        context.trace.kept = lengths
        routing = Routing(probability, natural, natural, context.grid)
        context.slots[self.slot] = Chunked(x, index, lengths, routing, view)
        return take(x, index), view.reduced(index, lengths, self.slot)

    def close(self, frame: Frame, view: TokenView, x: Tensor) -> tuple[Tensor, TokenView]:
        """De-chunk the change of the kept tokens and add it to the grid: (B, M, D) to (B, N, D)."""
        context = frame.context
        state: Chunked | None = context.slots[self.slot]
        if state is None:
            return x, view
        context.slots[self.slot] = None
        start, index, lengths, routing = state.start, state.index, state.lengths, state.routing
        packing = pack_index(index, lengths, routing.grid)
        change = (x - take(start, index)).reshape(-1, x.shape[-1])
        if len(set(lengths)) > 1:
            longest = index.shape[1]
            rows = [row * longest + place for row, length in enumerate(lengths) for place in range(length)]
            change = change.index_select(0, torch.tensor(rows, device=x.device))
        keep = torch.zeros_like(routing.keep).flatten().index_fill(0, packing.index, True).view_as(routing.keep)
        batch, count, width = start.shape
        context.trace.spend("Chunking residual", batch * residual_flops(count, width))
        if self.method.sigma and smooths_on_grid(change, routing.grid):
            context.trace.spend("Chunking de-chunk", batch * smoothing_flops(routing.grid, width))
        decision = Routing(routing.probability, keep, routing.natural_keep, routing.grid)
        return start + self.module.dechunk(change, start, decision, packing), state.view


def tail_drops(context: CallContext, view: TokenView, default: Curve) -> tuple[float, ...]:
    """Return the tail drop of every sample: the value from `tokdyn.set_tail_drop`, else the method's own setting.

    Args:
        context: the call of the model.
        view: the samples.
        default: the method's own setting, one share or a curve over noise levels.

    Raises:
        InputError: a value was set for another number of samples, or for two branches while the batch is odd.
    """
    value = context.settings.tail_drop
    if value is None:
        if isinstance(default, float):
            return (default,) * view.batch
        return tuple(at(default, level) for level in context.levels(view))
    if not isinstance(value, dict):
        return per_sample(value, view.batch, "tail_drop")
    seen = context.trace.observed
    parts = None if seen is None else seen.parts
    if parts:
        told = split(view.batch, parts)
        if told is None:
            raise InputError(
                f"the branches {', '.join(parts)} are said to be equal parts of the batch, but {view.batch} samples "
                f"have no {len(parts)} equal parts; give as many samples to each branch."
            )
        return tuple(value["uncond" if is_unconditional(name) else "cond"] for name, rows in told for _ in rows)
    one = parts == () or (seen is not None and isinstance(seen.branch, str) and seen.branch != BOTH)
    if one or context.adapter.guidance == "calls":
        return (value["uncond" if context.position.unconditional else "cond"],) * view.batch
    context.trace.halves = True
    if view.batch % 2:
        raise InputError(
            f"tail_drop has a value for each guidance branch, but a batch of {view.batch} samples has no two halves; "
            "call the model with both branches in one batch, or set one number."
        )
    half = view.batch // 2
    first, second = (value[name] for name in context.adapter.halves)
    return (first,) * half + (second,) * half


@handles(Chunking)
def build(plan: Plan) -> Sequence[object]:
    """Build the bracket."""
    return [ChunkedBlocks(plan.method, plan.module, *plan.span, plan.slot)]


def call_chunked(
    model: nn.Module,
    original: Any,
    tokens: Tensor,
    grid: Grid,
    steps: Tensor,
    condition: Tensor,
    tail_drop: float | Tensor,
    plan: Tensor | None = None,
) -> tuple[Tensor, Routing]:
    """Replace `DCDiT._chunked`: apply the tail drop that was set, and skip the samples that FeatureCache reuses.

    Args:
        model: the DC-DiT.
        original: the original `_chunked`, called as `original(model, tokens, ...)`.
        tokens: (B, N, D) dense tokens.
        grid: their grid.
        steps: (B,) timesteps.
        condition: (B, D).
        tail_drop: one share or (B,), used if none was set with `tokdyn.set_tail_drop`.
        plan: (B, N) bool, tokens to keep in place of the router's decision; None leaves the decision to the router.

    Returns:
        The tokens (B, N, D) after the blocks, and the routing. A skipped sample has the routing of the step in which it
        was last computed.
    """
    frame: Frame | None = class_swap.current()
    if frame is None or frame.context.model is not model:
        out: tuple[Tensor, Routing] = original(model, tokens, grid, steps, condition, tail_drop, plan)
        return out
    context = frame.context
    view = TokenView(tuple(range(len(tokens))), tokens.shape[1], tokens.shape[1], tokens.device)
    context.trace.batch, context.trace.cells = view.batch, view.cells
    if context.settings.tail_drop is not None:
        tail_drop = torch.tensor(tail_drops(context, view, 0.0), device=tokens.device)
    cache = frame.handlers.own_chunking
    if cache is None or context.training or cache.never:
        return original(model, tokens, grid, steps, condition, tail_drop, plan)  # type: ignore[no-any-return]
    tokens, inner = cache.open(frame, view, tokens, None)
    branch = cache.memory.branches.get(context.position.branch)
    running = [place for place in range(view.batch) if place not in inner.idle]
    if len(running) == view.batch:
        result, routing = original(model, tokens, grid, steps, condition, tail_drop, plan)
    else:
        assert branch is not None
        assert branch.routing is not None
        result, routing = tokens, branch.routing
        if running:
            part = view.take(running)
            arguments = (tokens, grid, steps, condition, tail_drop, plan)
            computed, decided = class_swap.within(
                frame._replace(view=part.view),
                original,
                model,
                *(_select_samples(value, part.places, view.batch) for value in arguments),
            )
            result = tokens.index_copy(0, part.places, computed.to(tokens.dtype))
            routing = _updated(routing, decided, part.places)
    result, _ = cache.close(frame, inner, result)
    if branch is not None:
        branch.routing = replace(routing, probability=routing.probability.detach(), losses={})
    return result, routing


def _select_samples(value: Any, places: Tensor, batch: int) -> Any:
    """Select the entries of some samples from a tensor with a batch axis; return anything else unchanged."""
    if isinstance(value, Tensor) and value.dim() and len(value) == batch:
        return value.index_select(0, places)
    return value


def _updated(before: Routing, decided: Routing, places: Tensor) -> Routing:
    """Replace the entries of some samples (b,) in an earlier routing of all samples by new decisions."""
    names = ("probability", "keep", "natural_keep")
    changed = {name: getattr(before, name).index_copy(0, places, getattr(decided, name)) for name in names}
    return replace(decided, **changed)
