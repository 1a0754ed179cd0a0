"""Which tokens TokenMerge merges: found from the input of a branch, or taken over from an earlier block."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from tokdyn.attach.run import Run
from tokdyn.attach.sites import Role
from tokdyn.methods import TokenMerge
from tokdyn.methods.costs import matching_flops
from tokdyn.ops.destinations import Destinations, destinations, grid_destinations
from tokdyn.ops.merging import Merging, joined, match, merged_away


def plan_of(
    method: TokenMerge, first: int, run: Run, role: Role, rows: Tensor, ratio: float | Sequence[float]
) -> Merging | None:
    """What the samples that are being computed merge.

    Args:
        method: the settings.
        first: the first block in which tokens are merged.
        run: the call.
        role: of the branch.
        rows: (T, D), its input.
        ratio: share of the tokens to merge away, or one for each sample.

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


def _matched(method: TokenMerge, run: Run, role: Role, rows: Tensor, ratio: float | Sequence[float]) -> Merging | None:
    """A matching of the rows as they are now."""
    lengths = (len(rows) // run.batch,) * run.batch if run.packing is None else run.packing.lengths
    into = _important(method, run, rows) if method.important else _fixed(method, run, role, rows.device)
    ratios = [ratio] * run.batch if isinstance(ratio, float) else ratio
    buckets = into.table.shape[1]
    away = [merged_away(count, buckets, each) for count, each in zip(lengths, ratios, strict=True)]
    if not any(away):
        return None
    alike = into.others is not None and len(set(away)) == 1
    for count in (count for count, gone in zip(lengths, away, strict=True) if gone):
        run.record.spend("TokenMerge matching", matching_flops(count, buckets, alike, rows.shape[1]))
    return match(rows, lengths, into, ratio)


def _fixed(method: TokenMerge, run: Run, role: Role, device: torch.device) -> Destinations:
    """Destinations that depend on the cells and on the noise level alone, chosen once for all blocks of a call."""
    key = ("destinations", id(method), run.samples, _enclosing(run, role))
    if key in run.kept:
        found: Destinations = run.kept[key]
        return found
    step: int | Tensor = 0
    if method.seed is not None:
        step = (run.clock(device) * 1000).round().long()
    if run.index is None and run.packing is None:
        made = grid_destinations(run.batch, run.grid, device, method.bucket, method.seed, step)
    else:
        made = destinations(*_cells(run, device), run.batch, run.grid, method.bucket, method.seed, step)
    run.kept[key] = made
    return made


def _important(method: TokenMerge, run: Run, rows: Tensor) -> Destinations:
    """The longest row of every bucket."""
    length = torch.linalg.vector_norm(rows.detach(), dim=1, dtype=torch.promote_types(rows.dtype, torch.float32))
    return destinations(*_cells(run, rows.device), run.batch, run.grid, method.bucket, importance=length)


def _cells(run: Run, device: torch.device) -> tuple[Tensor, Tensor]:
    """(T,) the cell and the sample of every row."""
    if run.packing is not None:
        return run.packing.cell, run.packing.sample
    index = run.index
    if index is None:
        index = torch.arange(run.count, device=device).expand(run.batch, -1)
    return index.reshape(-1), torch.arange(run.batch, device=device).repeat_interleave(index.shape[1])


def _enclosing(run: Run, role: Role) -> Hashable:
    """What decided which tokens there are: the brackets around a block."""
    if run.index is None and run.packing is None:
        return ()
    return tuple(id(each) for each in run.actors.brackets if each.first <= role.block <= each.last)
