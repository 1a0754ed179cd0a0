"""Statistics of a trajectory of a wrapped model by step and guidance branch: what was computed and what it cost.

In all of them a multiply-add is 2 FLOPs, and FLOPs are those of the blocks and the methods: embedders and head are left
out. A FLOPs figure is None if the adapter does not declare the products of the blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

_MANY, _ENDS = 120, 50  # a table of more calls shows this many of its first and last ones
_UNITS = ((1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"))


class _Costs(ABC):
    """Sums of FLOPs, and their share of those without methods."""

    @property
    @abstractmethod
    def block_flops(self) -> int | None:
        """FLOPs of the blocks that ran."""

    @property
    @abstractmethod
    def method_flops(self) -> int | None:
        """FLOPs of the methods' own computations, such as routers."""

    @property
    @abstractmethod
    def dense_flops(self) -> int | None:
        """FLOPs of all blocks on all tokens at full width, as without methods."""

    @property
    def flops(self) -> int | None:
        """FLOPs of blocks and methods together."""
        return _total([self.block_flops, self.method_flops])

    @property
    def share(self) -> float | None:
        """FLOPs of blocks and methods over those without methods."""
        return None if self.flops is None or not self.dense_flops else self.flops / self.dense_flops


class _Sum(_Costs):
    """Sums of FLOPs over several calls."""

    calls: tuple[CallStats, ...]

    @property
    def block_flops(self) -> int | None:
        """FLOPs of the blocks that ran."""
        return _total([call.block_flops for call in self.calls])

    @property
    def method_flops(self) -> int | None:
        """FLOPs of the methods' own computations, such as routers."""
        return _total([call.method_flops for call in self.calls])

    @property
    def dense_flops(self) -> int | None:
        """FLOPs of all blocks on all tokens at full width, as without methods."""
        return _total([call.dense_flops for call in self.calls])


@dataclass(frozen=True)
class CallStats(_Costs):
    """One call of the model, or the half of its batch that is one guidance branch.

    Means are over the blocks that ran and their samples; they are None if no block ran.

    Attributes:
        step: number of the step, from 0.
        branch: "cond", "uncond" or another name if the guidance branch is known by name; otherwise the number of the
            call within its step, from 0.
        level: mean noise level of the samples, where 1 is pure noise; None if the model has no noise level.
        samples: number of samples in the batch, or in its half.
        cells: N, image tokens of a sample without methods.
        blocks: indices of the blocks that ran for at least one sample.
        tokens: for each of these blocks, the largest number of image tokens that it computed of one sample.
        depth: number of blocks of the model.
        kept: for each sample, the smallest number of image tokens that a block computed; None if no block ran for it.
        attention_tokens: mean number of image tokens of a sample in attention; merged tokens count once.
        mlp_tokens: mean number of image tokens of a sample in the MLP.
        heads: mean share of the attention heads that were computed.
        channels: mean share of the MLP channels that were computed.
        reused: number of samples in a cached step, whose blocks did not run.
        parts: FLOPs of the blocks by part.
        methods: FLOPs of the methods' own computations by name.
        dense: FLOPs of all blocks on all tokens at full width, by part.
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
        """Whether all samples were reused."""
        return 0 < self.samples == self.reused

    @property
    def block_flops(self) -> int | None:
        """FLOPs of the blocks that ran."""
        return None if self.parts is None else sum(self.parts.values())

    @property
    def method_flops(self) -> int | None:
        """FLOPs of the methods' own computations, such as routers."""
        return None if self.methods is None else sum(self.methods.values())

    @property
    def dense_flops(self) -> int | None:
        """FLOPs of all blocks on all tokens at full width, as without methods."""
        return None if self.dense is None else sum(self.dense.values())


@dataclass(frozen=True)
class StepStats(_Sum):
    """One step: the calls at one noise level.

    Attributes:
        step: number of the step, from 0.
        level: noise level of its first call, where 1 is pure noise; None if the model has no noise level.
        calls: one entry for each guidance branch.
    """

    step: int
    level: float | None
    calls: tuple[CallStats, ...]


@dataclass(frozen=True)
class TrajectoryStats(_Sum):
    """A trajectory, or one call in training. Printed, it is a table.

    Attributes:
        model: class name of the model.
        calls: one entry for each call and guidance branch, in order.
    """

    model: str
    calls: tuple[CallStats, ...]

    @property
    def steps(self) -> tuple[StepStats, ...]:
        """The calls, grouped by step."""
        steps = [tuple(calls) for _, calls in groupby(self.calls, key=lambda call: call.step)]
        return tuple(StepStats(calls[0].step, calls[0].level, calls) for calls in steps)

    @property
    def cached(self) -> int:
        """Number of calls in which all samples were reused."""
        return sum(call.cached for call in self.calls)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields and sums as a JSON-ready dictionary."""
        names = ("block_flops", "method_flops", "dense_flops", "flops", "share")
        calls = [{**asdict(call), **{name: getattr(call, name) for name in ("cached", *names)}} for call in self.calls]
        return {"model": self.model, **{name: getattr(self, name) for name in names}, "calls": calls}

    def __str__(self) -> str:
        return as_text(self)


def _total(values: Sequence[int | None]) -> int | None:
    """Return the sum; None if a value is None."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def as_text(trajectory: TrajectoryStats) -> str:
    """Write a table with one line for each call, followed by a summary."""
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
    """Write the smallest, largest and mean number of tokens of the samples."""
    counts = [count for count in kept if count is not None]
    if not counts:
        return "-"
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}, mean {sum(counts) / len(counts):.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}".removesuffix(".0")


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def unit_of(most: float) -> tuple[float, str]:
    """Return divisor and name of the unit in which FLOPs of up to `most` are printed, such as (1e9, "GFLOPs")."""
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
        return [*lines, "FLOPs are not known: the adapter does not declare the products of the blocks"]
    size, unit = unit_of(dense)
    return [
        *lines,
        f"blocks {blocks / size:.3f} and methods {methods / size:.3f} of {dense / size:.3f} {unit} dense: "
        f"{(blocks + methods) / dense:.1%}",
        "multiply-add = 2 FLOPs; embedders and head are not included",
    ]
