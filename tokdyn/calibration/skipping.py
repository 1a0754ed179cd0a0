"""Calibrate DepthSkip: how much each block matters at each noise level, and what to skip for a FLOPs target."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from tokdyn.adapters.clock import Level
from tokdyn.attach import fingerprint
from tokdyn.calibration.levels import Bins, bins_of
from tokdyn.calibration.replay import Look, Replay, Spent
from tokdyn.calibration.sequential import Trial, sequential_skips
from tokdyn.errors import InputError
from tokdyn.methods import DepthSkip
from tokdyn.ops.skipping import block_influence, choose_skips
from tokdyn.progress import progress
from tokdyn.recorder import Call, evaluating, listed

Skips = tuple[tuple[int, ...], ...]
"""The skipped blocks of every noise-level row."""


@dataclass(frozen=True)
class Measured:
    """Measurements of a model's blocks in recorded calls.

    Attributes:
        bins: noise-level rows.
        influence: (levels, blocks) 1 - mean cosine between input and output of a block; 0 if it never ran.
        cost: (levels, blocks) FLOPs of the blocks in all calls, fp64; a multiply-add is 2 FLOPs.
        other: (levels,) FLOPs of everything else.
        rows: for each call, the row of each sample.
        deviation: (levels, blocks) standard deviation of the influence over the samples of a row.
    """

    bins: Bins
    influence: Tensor
    cost: Tensor
    other: Tensor
    rows: tuple[tuple[int, ...], ...]
    deviation: Tensor


@dataclass(frozen=True)
class SkipCalibration:
    """The result of `calibrate_skipping`.

    Attributes:
        method: DepthSkip with the table.
        measured: the measurements that the table was chosen from.
        skips: skipped blocks of every noise-level row.
        target: share of the FLOPs that was asked for.
        flops: share of the FLOPs of the recorded calls that remains.
        error: relative error of the output, `|y - y0| / |y0|`, for each row; None if it was not measured.
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
    level: Level | None = None,
) -> SkipCalibration:
    """Choose blocks to skip; see `tokdyn.calibrate` for the arguments.

    Args:
        model: not wrapped.
        calls: recorded calls.
        method: settings to keep.
        flops: target, as a share of the FLOPs.
        levels: the largest number of noise-level rows, or the edges between them.
        protected: blocks that always run.
        sequential: measure the error of the output again after every choice.
        errors: measure the error of the result even if the choice does not need it.
        level: the noise level of a call, as in `tokdyn.wrap`.

    Raises:
        InputError: the settings contradict each other, or do not fit the calls or the model.
        UnsupportedModelError: no adapter knows the model.
    """
    if method.blocks or method.learned:
        given = "learned=True" if method.learned else f"blocks={method.blocks}"
        raise InputError(f"DepthSkip({given}) already says what is skipped; calibrate DepthSkip() instead.")
    replay, recorded = Replay(model, level), listed(calls)
    always = _normalised(protected, replay.depth)
    with evaluating(model):
        measured = measure(replay, recorded, levels)
        skips = choose_skips(measured.influence, measured.cost, measured.other, flops, always)
        error = None
        if sequential or errors:
            trial = Trial(replay, recorded, measured.bins, measured.rows)
            if sequential:
                skips = sequential_skips(trial, measured.cost, measured.other, flops, always, skips)
            error = trial.relative(skips)
    table = tuple((low, high, blocks) for (low, high), blocks in zip(measured.bins.rows(), skips, strict=True))
    calibrated = DepthSkip(**{**method.model_dump(), "table": table, "fingerprint": fingerprint(model)})
    whole = float(measured.cost.sum() + measured.other.sum())
    saved = sum(float(measured.cost[row, block]) for row, blocks in enumerate(skips) for block in blocks)
    return SkipCalibration(calibrated, measured, skips, flops, 1.0 - saved / whole, error)


def measure(replay: Replay, calls: Sequence[Call], levels: int | Sequence[float] | None) -> Measured:
    """Repeat all calls, and measure how much every block changes the direction of its image tokens."""
    seen: list[tuple[tuple[float, ...], Tensor, Tensor, float]] = []
    with progress("measuring", len(calls)) as advance:
        for call in calls:
            seen.append(_measure_call(replay, call))
            advance(1)
    bins = bins_of([level for row, *_ in seen for level in row], levels)
    depth = replay.depth
    total, squares, count = torch.zeros(3, len(bins), depth, dtype=torch.float64)
    cost, other = torch.zeros(len(bins), depth, dtype=torch.float64), torch.zeros(len(bins), dtype=torch.float64)
    rows = []
    for level, influence, blocks, rest in seen:
        sample_rows = [bins.of(each) for each in level]
        samples = len(sample_rows)
        index = torch.tensor(sample_rows)
        ran = influence.isfinite()
        finite = torch.where(ran, influence, 0.0).double().cpu()
        total.index_add_(0, index, finite)
        squares.index_add_(0, index, finite.square())
        count.index_add_(0, index, ran.double().cpu())
        cost.index_add_(0, index, repeat(blocks / samples, "block -> sample block", sample=samples))
        other.index_add_(0, index, torch.full((samples,), rest / samples, dtype=torch.float64))
        rows.append(tuple(sample_rows))
    mean = total / count.clamp(min=1)
    deviation = (squares / count.clamp(min=1) - mean.square()).clamp(min=0).sqrt()
    return Measured(bins, mean, cost, other, tuple(rows), deviation)


def _measure_call(replay: Replay, call: Call) -> tuple[tuple[float, ...], Tensor, Tensor, float]:
    """Return levels, (B, blocks) influence (NaN for blocks that did not run), (blocks,) FLOPs and FLOPs of the rest."""
    influences: dict[int, Tensor] = {}

    def compute(spent: Spent) -> tuple[Tensor, float]:
        before: dict[int, tuple[Tensor, int]] = {}
        blocks = torch.zeros(replay.depth, dtype=torch.float64)

        def entering(look: Look) -> None:
            before[look.block] = look.x, spent()

        def leaving(look: Look) -> None:
            x, began = before.pop(look.block)
            blocks[look.block] += spent() - began
            influences[look.block] = _influence(x, look)

        with replay.watching(call, entering, leaving):
            replay(call)
        return blocks, spent() - float(blocks.sum())

    blocks, rest = replay.counted(call, compute)
    if not influences:
        raise InputError(
            f"no block of {type(replay.model).__name__} ran in a recorded call; record calls of this model."
        )
    first = next(iter(influences.values()))
    not_run = torch.full_like(first, float("nan"))
    columns = [influences.get(block, not_run).to(first.device) for block in range(replay.depth)]
    influence = torch.stack(columns, dim=1)
    return replay.levels(call, len(first)), influence, blocks, rest


def _influence(before: Tensor, after: Look) -> Tensor:
    """Compute the (B,) influence of a block, averaged over the rows of each sample if they are packed."""
    if after.packing is None:
        return block_influence(before, after.x)
    rows = block_influence(before[:, None], after.x[:, None])
    lengths = torch.tensor(after.packing.lengths, device=rows.device)
    return rows.new_zeros(len(lengths)).index_add_(0, after.packing.sample, rows) / lengths


def _normalised(protected: Sequence[int], depth: int) -> tuple[int, ...]:
    """Turn negative block numbers into positive ones."""
    for block in protected:
        if not -depth <= block < depth:
            raise InputError(
                f"there is no block {block} to protect in a model of {depth} blocks; its blocks are 0 to {depth - 1}."
            )
    return tuple(sorted({block % depth for block in protected}))
