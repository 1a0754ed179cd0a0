"""TokenMerge at work on packed rows (T, D): every sample has tokens and a ratio of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokdyn.attach.roles import Role
from tokdyn.attach.run import Run
from tokdyn.methods import TokenMerge
from tokdyn.ops.destinations import destinations
from tokdyn.ops.merging import Merging, match, merge, unmerge
from tokdyn.ops.schedules import at
from tokdyn.tokens import Packing


def packed_merge(method: TokenMerge, run: Run, role: Role, call: Callable[..., Any], named: dict[str, Any]) -> Any:
    """Merge, compute, unmerge: the branch of a block whose rows lie as `run.packing` says."""
    packing = run.packing
    assert packing is not None
    name = role.names[0]
    rows: Tensor = named[name]
    plan = _plan(method, run, rows, packing)
    if plan is None:
        return call(**named)
    given = {**named, name: merge(rows, plan)}
    seen = run.call.attention if role.kind == "attention" else run.call.mlp
    seen.extend((1, length) for length in plan.lengths)
    if role.stack.packing in given:
        given[role.stack.packing] = _left(packing, plan)
    return unmerge(call(**given), plan)


def _plan(method: TokenMerge, run: Run, rows: Tensor, packing: Packing) -> Merging | None:
    """What the samples merge; None if that is nothing."""
    curve = method.ratio
    ratios = [curve] * run.batch if isinstance(curve, float) else [at(curve, level) for level in run.level]
    if not any(int(length * ratio) for length, ratio in zip(packing.lengths, ratios, strict=True)):
        return None
    importance = None
    if method.important:
        importance = torch.linalg.vector_norm(
            rows.detach(), dim=1, dtype=torch.promote_types(rows.dtype, torch.float32)
        )
    step = 0 if method.seed is None else (run.clock(rows.device) * 1000).round().long()
    place = (packing.cell, packing.sample, run.batch, packing.grid)
    into = destinations(*place, method.bucket, method.seed, step, importance)
    plan = match(rows, packing.lengths, into, ratios)
    return plan if len(plan.source) else None


def _left(packing: Packing, plan: Merging) -> Packing:
    """Where the merged rows lie: each at the cell of the row that it kept."""
    offsets = torch.tensor([0, *plan.lengths], device=plan.keep.device).cumsum(0).to(torch.int32)
    index, sample, cell = (x.index_select(0, plan.keep) for x in (packing.index, packing.sample, packing.cell))
    return Packing(plan.lengths, index, sample, cell, offsets, packing.grid)
