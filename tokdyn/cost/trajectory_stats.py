"""Statistics of a trajectory of a wrapped model by step and guidance branch: what was computed and what it cost.

In all of them a multiply-add is 2 FLOPs, and FLOPs are those of the blocks and the methods: embedders and head are left
out. A FLOPs figure is None if the adapter does not declare the products of the blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any, TypeVar

from tokdyn.progress import in_ms

Number = TypeVar("Number", int, float)
_MANY, _ENDS = 120, 50  # a table of more calls shows this many of its first and last ones


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
    """Sums of FLOPs and of times over several calls."""

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

    @property
    def seconds(self) -> float | None:
        """Time of the calls of the model; None if that of a call is not known."""
        return _total([call.seconds for call in self.calls])

    @property
    def dense_seconds(self) -> float | None:
        """Time of the same calls without methods; None unless all of them were made, see `tokdyn.beside_dense`."""
        return _total([call.dense_seconds for call in self.calls])

    @property
    def speedup(self) -> float | None:
        """Time of the calls without methods over that with them; None unless both are known."""
        dense, seconds = self.dense_seconds, self.seconds
        return dense / seconds if dense and seconds else None


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
        seconds: time of the call on its device; of a call for both guidance branches half each. None in training, in
            graphs around the model, and for models without a noise level.
        dense_seconds: time of the same call without methods; None unless it was made, see `tokdyn.beside_dense`.
        cache_bytes: memory of the effects that FeatureCache keeps for these samples and this branch after the call.
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
    seconds: float | None = None
    dense_seconds: float | None = None
    cache_bytes: int = 0

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
        model: class name of the model, or of the pipeline.
        calls: one entry for each call and guidance branch, in order.
        pipeline_seconds: time of the whole call of the pipeline, in which the calls were made; None during it, and
            without a pipeline.
        shortfalls: by the name of a method, the share of the tokens that its settings ask to leave out and the share
            that it left out, in the first call in which it left out less.
    """

    model: str
    calls: tuple[CallStats, ...]
    pipeline_seconds: float | None = None
    shortfalls: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[StepStats, ...]:
        """The calls, grouped by step."""
        steps = [tuple(calls) for _, calls in groupby(self.calls, key=lambda call: call.step)]
        return tuple(StepStats(calls[0].step, calls[0].level, calls) for calls in steps)

    @property
    def cached(self) -> int:
        """Number of calls in which all samples were reused."""
        return sum(call.cached for call in self.calls)

    @property
    def denoiser_share(self) -> float | None:
        """Time of the calls of the model over that of the whole pipeline, both without dense calls beside them."""
        if self.pipeline_seconds is None or self.seconds is None:
            return None
        return self.seconds / (self.pipeline_seconds - (self.dense_seconds or 0.0))

    @property
    def pipeline_speedup(self) -> float | None:
        """Time of the whole pipeline if no method acted, over what it took; None unless all of that is known."""
        if self.pipeline_seconds is None or self.seconds is None or self.dense_seconds is None:
            return None
        return (self.pipeline_seconds - self.seconds) / (self.pipeline_seconds - self.dense_seconds)

    def as_dict(self) -> dict[str, Any]:
        """Return all fields and sums as a JSON-ready dictionary."""
        names = ("block_flops", "method_flops", "dense_flops", "flops", "share")
        times = ("seconds", "dense_seconds", "speedup", "pipeline_seconds", "denoiser_share", "pipeline_speedup")
        calls = [{**asdict(call), **{name: getattr(call, name) for name in ("cached", *names)}} for call in self.calls]
        sums = {name: getattr(self, name) for name in (*names, *times)}
        return {"model": self.model, **sums, "shortfalls": self.shortfalls, "calls": calls}

    def __str__(self) -> str:
        return as_text(self)


def _total(values: Sequence[Number | None]) -> Number | None:
    """Return the sum; None if a value is None."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def as_text(trajectory: TrajectoryStats) -> str:
    """Write a table with one line for each call, followed by a summary."""
    if not trajectory.calls:
        return f"{trajectory.model}: no calls since it was wrapped or reset"
    most = max(call.dense_flops or 0 for call in trajectory.calls)
    header: tuple[str, ...]
    header = (
        "step",
        "branch",
        "noise",
        "tokens",
        "in attention",
        "in MLP",
        "blocks",
        "reused",
        "GFLOPs",
        "dense",
        "share",
    )
    rows = [_row(call, most) for call in trajectory.calls]
    for name, values in _columns_of_times(trajectory.calls):
        header, rows = (*header, name), [(*row, value) for row, value in zip(rows, values, strict=True)]
    shown = rows if len(rows) <= _MANY else [*rows[:_ENDS], *rows[-_ENDS:]]
    widths = [max(len(row[column]) for row in (header, *shown)) for column in range(len(header))]
    lines = [_line(row, widths) for row in (header, *shown)]
    if len(shown) < len(rows):
        lines.insert(1 + _ENDS, f"... {len(rows) - len(shown)} calls ...")
    return "\n".join([*lines, *_summary(trajectory)])


def _row(call: CallStats, most: float) -> tuple[str, ...]:
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
        "-" if spent is None else in_gflops(spent, most),
        "-" if dense is None else in_gflops(dense, most),
        "-" if call.share is None else f"{call.share:.1%}",
    )


def _columns_of_times(calls: Sequence[CallStats]) -> list[tuple[str, list[str]]]:
    """List the columns of times in milliseconds that hold any, each with its name."""
    columns = (("ms", [call.seconds for call in calls]), ("dense ms", [call.dense_seconds for call in calls]))
    return [
        (name, ["-" if value is None else in_ms(value) for value in values])
        for name, values in columns
        if any(value is not None for value in values)
    ]


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


def in_gflops(flops: float, most: float) -> str:
    """Write FLOPs in GFLOPs, with three decimals; with six if the largest of their table, `most`, is below 1 GFLOP."""
    return f"{flops / 1e9:,.{3 if most >= 1e9 else 6}f}"


def _summary(trajectory: TrajectoryStats) -> list[str]:
    first, steps = trajectory.calls[0], len(trajectory.steps)
    reused = f", {trajectory.cached} of them reused" if trajectory.cached else ""
    lines = [
        f"{name} left out {reached:.1%} of the tokens, not {asked:.1%}"
        for name, (asked, reached) in trajectory.shortfalls.items()
    ]
    lines += [
        f"{trajectory.model}: {first.depth} blocks on {first.cells} image tokens, {steps} step{'s' * (steps > 1)}, "
        f"{len(trajectory.calls)} call{'s' * (len(trajectory.calls) > 1)}{reused}"
    ]
    lines += _times(trajectory)
    blocks, methods, dense = trajectory.block_flops, trajectory.method_flops, trajectory.dense_flops
    if blocks is None or methods is None or not dense:
        missing = "the adapter does not declare the products of the blocks; tokdyn.flops counts those of a call"
        return [*lines, f"FLOPs are not known: {missing}"]
    spent, added, whole = (in_gflops(each, dense) for each in (blocks, methods, dense))
    return [
        *lines,
        f"blocks {spent} and methods {added} of {whole} GFLOPs dense: {(blocks + methods) / dense:.1%}",
        "multiply-add = 2 FLOPs; embedders and head are not included",
    ]


def _times(trajectory: TrajectoryStats) -> list[str]:
    """Write how long it took, and how much faster than without methods that is."""
    seconds = trajectory.seconds
    if seconds is None:
        return []
    text = f"{in_ms(seconds)} ms in the model, {in_ms(seconds / len(trajectory.steps))} ms a step"
    if trajectory.denoiser_share is not None:
        text += f", {trajectory.denoiser_share:.0%} of the pipeline's time"
    if trajectory.speedup is None:
        return [text]
    faster = f"{trajectory.speedup:.2f} times as fast as without methods"
    whole = trajectory.pipeline_speedup
    return [text, faster if whole is None else f"{faster}, the whole pipeline {whole:.2f} times"]
