"""Around the chunking that DC-DiT does itself: feature caches on the full grid, and the budgets of the calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.attach import class_swap
from tokdyn.attach.handlers.budgets import drops
from tokdyn.attach.run import Run
from tokdyn.tokens import Grid, Routing


def _chunked(
    model: nn.Module,
    hidden: Any,
    tokens: Tensor,
    grid: Grid,
    steps: Tensor,
    condition: Tensor,
    tail_drop: float | Tensor,
    plan: Tensor | None = None,
) -> tuple[Tensor, Routing]:
    """Takes the place of `DCDiT._chunked`: samples whose change is repeated are not computed.

    The routing of such a sample is the one of the step that is repeated.
    """
    run: Run | None = class_swap.current()
    if run is None or run.model is not model:
        out: tuple[Tensor, Routing] = hidden(model, tokens, grid, steps, condition, tail_drop, plan)
        return out
    run.batch = run.record.batch = len(tokens)
    run.record.cells = tokens.shape[1]
    if run.attachment.tail_drop is not None:
        tail_drop = torch.tensor(drops(run, 0.0), device=tokens.device)
    for cache in run.attachment.caches:
        tokens = cache.open(run, tokens)
    reused, run.reused = run.reused, frozenset()
    if not reused:
        result, routing = hidden(model, tokens, grid, steps, condition, tail_drop, plan)
    else:
        (cache,) = run.attachment.caches
        result, routing = tokens, cache.memory.routing[run.turn.branch]
        running = [i for i in range(len(tokens)) if i not in reused]
        if running:
            rows = torch.tensor(running, device=tokens.device)
            drop = tail_drop.index_select(0, rows) if isinstance(tail_drop, Tensor) and tail_drop.dim() else tail_drop
            parts = (tokens.index_select(0, rows), grid, steps.index_select(0, rows), condition.index_select(0, rows))
            rest = (drop, None if plan is None else plan.index_select(0, rows))
            some, found = run.among(running, None, lambda: hidden(model, *parts, *rest))
            result = tokens.index_copy(0, rows, some.to(tokens.dtype))
            routing = _mixed(routing, found, rows)
    for cache in reversed(run.attachment.caches):
        result = cache.close(run, result)
        if not (run.training or cache.never):
            cache.memory.routing[run.turn.branch] = _kept(routing)
    return result, routing


def _mixed(before: Routing, found: Routing, rows: Tensor) -> Routing:
    """Decisions of some samples in place of earlier ones."""
    names = ("probability", "keep", "natural_keep")
    return replace(found, **{name: getattr(before, name).index_copy(0, rows, getattr(found, name)) for name in names})


def _kept(routing: Routing) -> Routing:
    """A decision that outlasts its call: without losses."""
    return replace(routing, probability=routing.probability.detach(), losses={})
