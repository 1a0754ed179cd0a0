"""Calibrating DepthSkip: how much each block matters at each noise level, and what to skip for a FLOPs target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.attach import fingerprint
from tokdyn.calibration.levels import Bins, bins_of
from tokdyn.calibration.recording import Call, listed
from tokdyn.calibration.replay import Look, Replay, Spent, evaluating
from tokdyn.calibration.sequential import Trial, sequential_skips
from tokdyn.errors import InputError
from tokdyn.methods import DepthSkip
from tokdyn.ops.skipping import block_influence, choose_skips
from tokdyn.progress import progress

Skips = tuple[tuple[int, ...], ...]
"""The skipped blocks of every row of noise levels."""


@dataclass(frozen=True)
class Measured:
    """What recorded calls say about the blocks of a model.

    Attributes:
        bins: rows of noise levels.
        influence: (levels, blocks) 1 - mean cosine between the input and the output of a block; 0 where it never ran.
        cost: (levels, blocks) FLOPs of the blocks in all calls, fp64; a multiply-add is 2 FLOPs.
        other: (levels,) FLOPs of everything else.
        rows: for each call the row of each of its samples.
    """

    bins: Bins
    influence: Tensor
    cost: Tensor
    other: Tensor
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class SkipCalibration:
    """The result of `calibrate_skipping`.

    Attributes:
        method: with the table.
        measured: what it was chosen from.
        skips: blocks skipped at each row of noise levels.
        target: share of the FLOPs that was asked for.
        flops: share of the FLOPs of the recorded calls that is left.
        error: relative error of the output, |y - y0| / |y0|, for each row; None if it was not measured.
    """

    method: DepthSkip
    measured: Measured
    skips: Skips
    target: float
    flops: float
    error: tuple[float, ...] | None


def calibrate_skipping(
    model: nn.Module,
    calls: Iterable[Mapping[str, Any]],
    method: DepthSkip,
    flops: float,
    levels: int | Sequence[float] | None = None,
    protected: Sequence[int] = (),
    sequential: bool = False,
    errors: bool = False,
) -> SkipCalibration:
    """Choose blocks to skip; see `tokdyn.calibrate` for the arguments.

    Args:
        model: not wrapped.
        calls: recorded.
        method: settings to keep.
        flops: target.
        levels: rows of noise levels.
        protected: blocks that always run.
        sequential: measure the output again after every choice.
        errors: measure the error of the result even where that is not needed for choosing.

    Raises:
        InputError: settings that do not fit each other, the calls or the model.
        UnsupportedModelError: no adapter knows the model.
    """
    if method.blocks or method.learned:
        given = "learned=True" if method.learned else f"blocks={method.blocks}"
        raise InputError(f"DepthSkip({given}) says already what is skipped; calibrate DepthSkip().")
    replay, found = Replay(model), listed(calls)
    always = _counted(protected, replay.depth)
    with evaluating(model):
        measured = measure(replay, found, levels)
        skips = choose_skips(measured.influence, measured.cost, measured.other, flops, always)
        error = None
        if sequential or errors:
            trial = Trial(replay, found, measured.bins, measured.rows)
            if sequential:
                skips = sequential_skips(trial, measured.cost, measured.other, flops, always, skips)
            error = trial.relative(skips)
    table = tuple((low, high, blocks) for (low, high), blocks in zip(measured.bins.rows(), skips, strict=True))
    made = DepthSkip(**{**method.model_dump(), "table": table, "fingerprint": fingerprint(model)})
    whole = float(measured.cost.sum() + measured.other.sum())
    saved = sum(float(measured.cost[row, block]) for row, blocks in enumerate(skips) for block in blocks)
    return SkipCalibration(made, measured, skips, flops, 1.0 - saved / whole, error)


def measure(replay: Replay, calls: Sequence[Call], levels: int | Sequence[float] | None) -> Measured:
    """Call the model with all calls, and look at how much every block turns its image tokens."""
    seen: list[tuple[tuple[float, ...], Tensor, Tensor, float]] = []
    with progress("measuring", len(calls)) as advance:
        for call in calls:
            seen.append(_look(replay, call))
            advance(1)
    bins = bins_of([level for row, *_ in seen for level in row], levels)
    depth = replay.depth
    total, count = torch.zeros(2, len(bins), depth, dtype=torch.float64)
    cost, other = torch.zeros(len(bins), depth, dtype=torch.float64), torch.zeros(len(bins), dtype=torch.float64)
    rows = []
    for level, influence, blocks, rest in seen:
        where = [bins.of(each) for each in level]
        place = torch.tensor(where)
        there = influence.isfinite()
        total.index_add_(0, place, torch.where(there, influence, 0.0).double().cpu())
        count.index_add_(0, place, there.double().cpu())
        cost.index_add_(0, place, (blocks / len(where)).expand(len(where), -1))
        other.index_add_(0, place, torch.full((len(where),), rest / len(where), dtype=torch.float64))
        rows.append(tuple(where))
    return Measured(bins, total / count.clamp(min=1), cost, other, tuple(rows))


def _look(replay: Replay, call: Call) -> tuple[tuple[float, ...], Tensor, Tensor, float]:
    """Levels, (B, blocks) influence with NaN for blocks that did not run, (blocks,) FLOPs, FLOPs of the rest."""
    found: dict[int, Tensor] = {}

    def run(spent: Spent) -> tuple[Tensor, float]:
        before: dict[int, tuple[Tensor, int]] = {}
        blocks = torch.zeros(replay.depth, dtype=torch.float64)

        def entering(look: Look) -> None:
            before[look.block] = look.x, spent()

        def leaving(look: Look) -> None:
            x, began = before.pop(look.block)
            blocks[look.block] += spent() - began
            found[look.block] = _influence(x, look)

        with replay.watching(call, entering, leaving):
            replay(call)
        return blocks, spent() - float(blocks.sum())

    blocks, rest = replay.counted(call, run)
    if not found:
        raise InputError(
            f"no block of {type(replay.model).__name__} ran in a recorded call; record calls of this model."
        )
    first = next(iter(found.values()))
    nothing = torch.full_like(first, float("nan"))
    influence = torch.stack([found.get(block, nothing).to(first.device) for block in range(replay.depth)], dim=1)
    return replay.levels(call, len(first)), influence, blocks, rest


def _influence(before: Tensor, after: Look) -> Tensor:
    """(B,) influence; the mean over the rows of each sample where they are packed."""
    if after.packing is None:
        return block_influence(before, after.x)
    rows = block_influence(before[:, None], after.x[:, None])
    lengths = torch.tensor(after.packing.lengths, device=rows.device)
    return rows.new_zeros(len(lengths)).index_add_(0, after.packing.sample, rows) / lengths


def _counted(protected: Sequence[int], depth: int) -> tuple[int, ...]:
    """Blocks counted from the front."""
    for block in protected:
        if not -depth <= block < depth:
            raise InputError(
                f"there is no block {block} to protect in a model of {depth} blocks; they are 0 to {depth - 1}."
            )
    return tuple(sorted({block % depth for block in protected}))
