"""Which tokens TokenMerge merges: found from the input of a branch, or taken over from an earlier block."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from tokdyn.attach.roles import Role
from tokdyn.attach.run import Run
from tokdyn.methods import TokenMerge
from tokdyn.methods.costs import matching_flops
from tokdyn.ops.destinations import Destinations, destinations, grid_destinations
from tokdyn.ops.merging import Merging, joined, match, merged_away


def plan_of(method: TokenMerge, first: int, run: Run, role: Role, rows: Tensor, ratio: float) -> Merging | None:
    """What the samples that are being computed merge.

    Args:
        method: the settings.
        first: the first block in which tokens are merged.
        run: the call.
        role: of the branch.
        rows: (B * N, D), its input.
        ratio: share of the tokens to merge away.

    Returns:
        The plan; None if there is nothing to merge.
    """
    if method.reuse == 1:
        return _matched(method, run, role, rows, ratio)
    window = (role.block - first) // method.reuse
    key = ("plans", id(method), role.kind, window, _enclosing(run, role))
    found: dict[int, tuple[Merging, int]] = run.kept.setdefault(key, {})
    new = [place for place, sample in enumerate(run.samples) if sample not in found]
    if new:  # of a sample that skipped the block in which others were matched
        plan = _matched(method, run, role, rows, ratio)
        if plan is None:
            return None
        found.update({run.samples[place]: (plan, place) for place in new})
    plans = [found[sample] for sample in run.samples]
    one = plans[0][0]
    if len(one.lengths) == run.batch and all(plan is one and place == i for i, (plan, place) in enumerate(plans)):
        return one
    return joined([plan.sample(place) for plan, place in plans])


def _matched(method: TokenMerge, run: Run, role: Role, rows: Tensor, ratio: float) -> Merging | None:
    """A matching of the rows as they are now."""
    count = len(rows) // run.batch
    into = _important(method, run, rows) if method.important else _fixed(method, run, role, rows.device)
    buckets = into.table.shape[1]
    if merged_away(count, buckets, ratio) == 0:
        return None
    compared = matching_flops(count, buckets, into.others is not None, rows.shape[1])
    run.record.spend("TokenMerge matching", run.batch * compared)
    return match(rows, [count] * run.batch, into, ratio)


def _fixed(method: TokenMerge, run: Run, role: Role, device: torch.device) -> Destinations:
    """Destinations that depend on the cells and on the noise level alone, chosen once for all blocks of a call."""
    key = ("destinations", id(method), run.samples, _enclosing(run, role))
    if key in run.kept:
        found: Destinations = run.kept[key]
        return found
    step = torch.zeros((), dtype=torch.int64) if method.seed is None else (run.clock(device) * 1000).round().long()
    chosen: dict[str, Any] = {"bucket": method.bucket, "seed": method.seed, "step": step}
    if run.index is None:
        made = grid_destinations(run.batch, run.grid, device, **chosen)
    else:
        made = destinations(*_cells(run, run.index), run.batch, run.grid, **chosen)
    run.kept[key] = made
    return made


def _important(method: TokenMerge, run: Run, rows: Tensor) -> Destinations:
    """The longest row of every bucket."""
    index = run.index
    if index is None:
        index = torch.arange(run.count, device=rows.device).expand(run.batch, -1)
    length = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
    return destinations(*_cells(run, index), run.batch, run.grid, method.bucket, importance=length)


def _cells(run: Run, index: Tensor) -> tuple[Tensor, Tensor]:
    """(B * M,) the cell and the sample of every row."""
    sample = torch.arange(run.batch, device=index.device)
    return index.reshape(-1), sample.repeat_interleave(index.shape[1])


def _enclosing(run: Run, role: Role) -> Hashable:
    """What decided which tokens there are: the brackets around a block."""
    if run.index is None:
        return ()
    return tuple(id(each) for each in run.actors.brackets if each.first <= role.block <= each.last)
