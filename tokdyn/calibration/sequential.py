"""Choose blocks to skip one by one, by the error that skipping them causes in the output of the model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tokdyn.attach import accept_methods, unwrap, wrap
from tokdyn.calibration.levels import Bins
from tokdyn.calibration.replay import Replay, prediction
from tokdyn.methods import DepthSkip
from tokdyn.ops.skipping import skip_budget
from tokdyn.progress import progress
from tokdyn.recorder import Call

Skips = tuple[tuple[int, ...], ...]


class Trial:
    """Measures the output of a model without some of its blocks.

    Args:
        replay: the model.
        calls: recorded calls.
        bins: noise-level rows.
        rows: for each call, the row of each sample.
    """

    def __init__(self, replay: Replay, calls: Sequence[Call], bins: Bins, rows: Sequence[Sequence[int]]) -> None:
        self._replay, self._bins = replay, bins
        self._calls, self._rows = calls, [torch.tensor(row) for row in rows]
        self._full = [self._predict(call) for call in calls]

    def error(self, row: int, blocks: Sequence[int]) -> float:
        """Sum `|y - y0|**2 / |y0|**2` over the samples of a row, where y lacks the blocks and y0 lacks none."""
        errors = []
        with self._skipping(blocks):
            for call, rows, full in zip(self._calls, self._rows, self._full, strict=True):
                samples = (rows == row).nonzero().flatten().to(full.device)
                if len(samples):
                    y, y0 = (each.index_select(0, samples).float().flatten(1) for each in (self._predict(call), full))
                    norm = y0.square().sum(1).clamp(min=torch.finfo(torch.float32).tiny)  # a fresh model predicts 0
                    errors.append(((y - y0).square().sum(1) / norm).sum())
        return float(torch.stack(errors).double().sum())

    def relative(self, skips: Skips) -> tuple[float, ...]:
        """Compute the root mean square of `|y - y0| / |y0|` over the samples of every row."""
        samples = torch.cat(self._rows).bincount(minlength=len(skips)).tolist()
        return tuple((self.error(row, blocks) / samples[row]) ** 0.5 for row, blocks in enumerate(skips))

    def _predict(self, call: Call) -> Tensor:
        return prediction(self._replay(call))

    @contextmanager
    def _skipping(self, blocks: Sequence[int]) -> Iterator[None]:
        accept_methods(wrap(self._replay.model, [DepthSkip(blocks=tuple(blocks))], self._replay.level))
        try:
            yield
        finally:
            unwrap(self._replay.model)


def sequential_skips(
    trial: Trial, cost: Tensor, other: Tensor, flops: float, protected: Sequence[int], start: Skips
) -> Skips:
    """Skip the block that adds least error per FLOP, measure again without it, and repeat until the target is met.

    Args:
        trial: measures errors.
        cost: (levels, blocks) FLOPs of the blocks.
        other: (levels,) FLOPs of everything else.
        flops: target, as a share of the FLOPs.
        protected: blocks that always run.
        start: another choice for the same target, returned if its error is lower, since choosing the best next block
            does not always lead to the best set.

    Returns:
        The skipped blocks of every row.
    """
    spent, goal = skip_budget(cost, other, flops, protected)
    levels, depth = cost.shape
    table = cost.tolist()
    chosen: list[tuple[int, ...]] = [()] * levels
    error = [0.0] * levels
    tried: dict[tuple[int, int], float] = {}
    cells = [(row, block) for row in range(levels) for block in range(depth) if table[row][block] > 0]
    cells = [cell for cell in cells if cell[1] not in protected]
    choices = math.ceil((spent - goal) * len(cells) / sum(table[row][block] for row, block in cells)) if cells else 0
    with progress("choosing", len(cells) + choices * len(cells) // levels) as advance:
        while spent > goal:
            for row, block in cells:
                if (row, block) not in tried and block not in chosen[row]:
                    tried[row, block] = trial.error(row, (*chosen[row], block))
                    advance(1)
            row, block = min(tried, key=lambda cell: (tried[cell] - error[cell[0]]) / table[cell[0]][cell[1]])
            chosen[row], error[row] = tuple(sorted((*chosen[row], block))), tried[row, block]
            tried = {cell: value for cell, value in tried.items() if cell[0] != row}
            spent -= table[row][block]
    start_error = sum(trial.error(row, blocks) for row, blocks in enumerate(start))
    return start if start_error < sum(error) else tuple(chosen)
