"""What a trajectory of a wrapped model did and cost, step by step and branch by branch; printed, it is a table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

_MANY, _ENDS = 120, 50  # calls that are shown, and how many of either end if there are more
_UNITS = ((1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"))


class _Costs(ABC):
    """FLOPs spent. A multiply-add is 2; embedders and head are not in it."""

    @property
    @abstractmethod
    def block_flops(self) -> int | None:
        """FLOPs of the blocks that ran; None where the adapter does not know what they multiply."""

    @property
    @abstractmethod
    def method_flops(self) -> int | None:
        """FLOPs of what the methods computed on top."""

    @property
    @abstractmethod
    def dense_flops(self) -> int | None:
        """FLOPs of all blocks on all tokens."""

    @property
    def flops(self) -> int | None:
        """FLOPs spent: of the blocks and the methods."""
        return _total([self.block_flops, self.method_flops])

    @property
    def share(self) -> float | None:
        """FLOPs spent against dense."""
        return None if self.flops is None or not self.dense_flops else self.flops / self.dense_flops


class _Sum(_Costs):
    """FLOPs of several calls."""

    calls: tuple[CallStats, ...]

    @property
    def block_flops(self) -> int | None:
        """FLOPs of the blocks that ran; None where the adapter does not know what they multiply."""
        return _total([call.block_flops for call in self.calls])

    @property
    def method_flops(self) -> int | None:
        """FLOPs of what the methods computed on top."""
        return _total([call.method_flops for call in self.calls])

    @property
    def dense_flops(self) -> int | None:
        """FLOPs of all blocks on all tokens."""
        return _total([call.dense_flops for call in self.calls])


@dataclass(frozen=True)
class CallStats(_Costs):
    """One call of the model, or the half of it that is one branch of guidance.

    Attributes:
        step: from 0.
        branch: of guidance, by its name where that is known, otherwise by its place among the calls of the step.
        level: noise level, 1 is pure noise; the mean over the samples, None where there is none.
        samples: in the batch, or its half.
        cells: N, image tokens of a sample.
        blocks: those that ran for at least one sample.
        tokens: image tokens that each of them saw, at most.
        depth: blocks that there are.
        kept: for each sample the fewest image tokens that a block saw; None where no block ran.
        attention_tokens: image tokens of a sample that attention saw, the mean over what ran; fewer where they were
            merged. None where nothing ran.
        mlp_tokens: the same of the MLP.
        heads: share of the attention heads that were computed, the mean over what ran; None where nothing ran.
        channels: the same of the channels of the MLP.
        reused: samples for which a cache repeated what the blocks did before.
        parts: FLOPs of the blocks by part; None where the adapter does not know what they multiply.
        methods: FLOPs of what the methods computed on top.
        dense: FLOPs of all blocks on all tokens, by part.
    """

    step: int
    branch: str | int
    level: float | None
    samples: int
    cells: int
    blocks: tuple[int, ...]
    tokens: tuple[int, ...]
    depth: int
    kept: tuple[int | None, ...]
    attention_tokens: float | None
    mlp_tokens: float | None
    heads: float | None
    channels: float | None
    reused: int
    parts: dict[str, int] | None
    methods: dict[str, int] | None
    dense: dict[str, int] | None

    @property
    def cached(self) -> bool:
        """All samples repeated what the blocks did before."""
        return 0 < self.samples == self.reused

    @property
    def block_flops(self) -> int | None:
        """FLOPs of the blocks that ran; None where the adapter does not know what they multiply."""
        return None if self.parts is None else sum(self.parts.values())

    @property
    def method_flops(self) -> int | None:
        """FLOPs of what the methods computed on top."""
        return None if self.methods is None else sum(self.methods.values())

    @property
    def dense_flops(self) -> int | None:
        """FLOPs of all blocks on all tokens."""
        return None if self.dense is None else sum(self.dense.values())


@dataclass(frozen=True)
class StepStats(_Sum):
    """One step: the calls at one noise level.

    Attributes:
        step: from 0.
        level: noise level, None where there is none.
        calls: one for each branch of guidance.
    """

    step: int
    level: float | None
    calls: tuple[CallStats, ...]


@dataclass(frozen=True)
class TrajectoryStats(_Sum):
    """A trajectory, or one call in training. Printed, it is a table.

    Attributes:
        model: name of its class.
        calls: in order.
    """

    model: str
    calls: tuple[CallStats, ...]

    @property
    def steps(self) -> tuple[StepStats, ...]:
        """The calls by step."""
        steps = [tuple(calls) for _, calls in groupby(self.calls, key=lambda call: call.step)]
        return tuple(StepStats(calls[0].step, calls[0].level, calls) for calls in steps)

    @property
    def cached(self) -> int:
        """Calls in which all samples repeated what the blocks did before."""
        return sum(call.cached for call in self.calls)

    def as_dict(self) -> dict[str, Any]:
        """The same in lists, numbers and names, as JSON takes it."""
        names = ("block_flops", "method_flops", "dense_flops", "flops", "share")
        calls = [{**asdict(call), **{name: getattr(call, name) for name in ("cached", *names)}} for call in self.calls]
        return {"model": self.model, **{name: getattr(self, name) for name in names}, "calls": calls}

    def __str__(self) -> str:
        return as_text(self)


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def as_text(trajectory: TrajectoryStats) -> str:
    """One line for each call, and two that sum up."""
    if not trajectory.calls:
        return f"{trajectory.model}: no calls since it was wrapped or reset"
    size, unit = unit_of(max(call.dense_flops or 0 for call in trajectory.calls))
    header = ("step", "branch", "noise", "tokens", "in attention", "in MLP", "blocks", "reused", unit, "dense", "share")
    rows = [_row(call, size) for call in trajectory.calls]
    shown = rows if len(rows) <= _MANY else [*rows[:_ENDS], *rows[-_ENDS:]]
    widths = [max(len(row[column]) for row in (header, *shown)) for column in range(len(header))]
    lines = [_line(row, widths) for row in (header, *shown)]
    if len(shown) < len(rows):
        lines.insert(1 + _ENDS, f"... {len(rows) - len(shown)} calls ...")
    return "\n".join([*lines, *_summary(trajectory)])


def _row(call: CallStats, size: float) -> tuple[str, ...]:
    spent, dense = call.flops, call.dense_flops
    return (
        str(call.step),
        str(call.branch),
        "-" if call.level is None else f"{call.level:.3f}",
        _kept(call.kept),
        _number(call.attention_tokens),
        _number(call.mlp_tokens),
        f"{len(call.blocks)}/{call.depth}",
        f"{call.reused}/{call.samples}" if call.reused else "-",
        "-" if spent is None else f"{spent / size:.3f}",
        "-" if dense is None else f"{dense / size:.3f}",
        "-" if call.share is None else f"{call.share:.1%}",
    )


def _kept(kept: Sequence[int | None]) -> str:
    """Least, most and mean of the samples."""
    there = [count for count in kept if count is not None]
    if not there:
        return "-"
    low, high = min(there), max(there)
    return str(low) if low == high else f"{low} to {high}, mean {sum(there) / len(there):.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}".removesuffix(".0")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def unit_of(most: float) -> tuple[float, str]:
    """What to divide FLOPs by, so that the largest has at most four digits before the point, and the unit."""
    return next(((size, name) for size, name in _UNITS if most >= size), (1e6, "MFLOPs"))


def _summary(trajectory: TrajectoryStats) -> list[str]:
    first, steps = trajectory.calls[0], len(trajectory.steps)
    reused = f", {trajectory.cached} of them reused" if trajectory.cached else ""
    lines = [
        f"{trajectory.model}: {first.depth} blocks on {first.cells} image tokens, {steps} step{'s' * (steps > 1)}, "
        f"{len(trajectory.calls)} call{'s' * (len(trajectory.calls) > 1)}{reused}"
    ]
    blocks, methods, dense = trajectory.block_flops, trajectory.method_flops, trajectory.dense_flops
    if blocks is None or methods is None or not dense:
        return [*lines, "FLOPs are not known: the adapter does not say what the blocks multiply"]
    size, unit = unit_of(dense)
    return [
        *lines,
        f"blocks {blocks / size:.3f} and methods {methods / size:.3f} of {dense / size:.3f} {unit} dense: "
        f"{(blocks + methods) / dense:.1%}",
        "multiply-add = 2 FLOPs; embedders and head are not in it",
    ]
