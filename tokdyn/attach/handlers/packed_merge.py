"""TokenMerge at work on packed rows (T, D): every sample has tokens and a ratio of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from tokdyn.attach.handlers.matching import plan_of
from tokdyn.attach.run import Run
from tokdyn.attach.sites import Role
from tokdyn.methods import TokenMerge
from tokdyn.ops.merging import Merging, merge, unmerge
from tokdyn.ops.pack import packing_of
from tokdyn.ops.schedules import at
from tokdyn.tokens import Packing


def packed_merge(
    method: TokenMerge, first: int, run: Run, role: Role, call: Callable[..., Any], named: dict[str, Any]
) -> Any:
    """Merge, compute, unmerge: the branch of a block whose rows lie as `run.packing` says.

    Args:
        method: the settings.
        first: the first block in which tokens are merged.
        run: the call.
        role: of the branch.
        call: the branch as it was; attention takes a bias of its keys by the name `key_bias`.
        named: its arguments.

    Returns:
        Its result, (T, D).
    """
    packing, curve, name = run.packing, method.ratio, role.names[0]
    assert packing is not None
    rows: Tensor = named[name]
    plan = plan_of(
        method, first, run, role, rows, curve if isinstance(curve, float) else [at(curve, level) for level in run.level]
    )
    if plan is None:
        return call(**named)
    given = {**named, name: merge(rows, plan)}
    seen = run.call.attention if role.kind == "attention" else run.call.mlp
    seen.extend((1, length) for length in plan.lengths)
    if role.kind == "attention" and method.weighted:
        given["key_bias"] = plan.size.log()
    if role.stack.packing in given:
        given[role.stack.packing] = _left(packing, plan)
    return unmerge(call(**given), plan)


def _left(packing: Packing, plan: Merging) -> Packing:
    """Where the merged rows lie: each at the cell of the row that it kept."""
    sample, cell = (x.index_select(0, plan.keep) for x in (packing.sample, packing.cell))
    return packing_of(plan.lengths, sample, cell, packing.grid)
