"""What a run of a wrapped model did, step by step and branch by branch, and what it cost."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from torch import nn

from tokdyn.adapters.structure import structures
from tokdyn.attach import attached, inner_model
from tokdyn.cost.blocks import Costs
from tokdyn.cost.table import as_text
from tokdyn.trace.calls import BlockTrace, CallTrace
from tokdyn.trace.steps import halves_of, last_run


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
class RunStats(_Sum):
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


def stats(model: nn.Module, guided: bool | None = None) -> RunStats:
    """What the last run did and what it cost, while it goes on or after it has ended.

    A run is a trajectory of sampling: it ends when a pipeline has made its images, when the noise level goes up again,
    or with `tokdyn.reset`. In training every call is one. The last 512 calls are remembered.

    Args:
        model: wrapped.
        guided: each batch held the two branches of guidance as halves; None where the methods had to know that.

    Raises:
        InputError: the model is not wrapped.
    """
    attachment, model = attached(model), inner_model(model)
    found = structures(model, attachment.adapter)
    costs, depth = None if found is None else Costs(found), attachment.blueprint.sizes.depth
    calls: list[CallStats] = []
    run = last_run(attachment.history, attachment.adapter)
    if guided is None:  # a cached step asks for no budgets
        guided = any(call.trace.halves for call in run)
    for call in run:
        for name, samples in halves_of(call.trace, call.branch, attachment.adapter, guided):
            calls.append(_call(call.trace, call.step, name, call.levels, samples, costs, depth))
    return RunStats(type(model).__name__, tuple(calls))


def _call(
    trace: CallTrace,
    step: int,
    branch: str | int,
    level: tuple[float, ...],
    samples: range,
    costs: Costs | None,
    depth: int,
) -> CallStats:
    """What some samples of a call saw and cost."""
    ran = [(part, count) for call in trace.blocks for part, count in [call.among(samples)] if count]
    most: dict[int, int] = {}
    for call, _ in ran:
        most[call.block] = max(call.tokens, most.get(call.block, 0))
    parts = methods = dense = None
    if costs is not None:
        share = len(samples) / trace.batch if trace.batch else 0.0
        parts = dict(_scaled([(costs.of(call), count / call.samples) for call, count in ran]))
        methods = dict(_scaled([(costs.methods(trace), share)]))
        dense = dict(_scaled([(costs.dense(trace), share)]))
    return CallStats(
        step=step,
        branch=branch,
        level=None if trace.level is None else sum(level[i] for i in samples) / len(samples) if samples else 0.0,
        samples=len(samples),
        cells=trace.cells,
        blocks=tuple(most),
        tokens=tuple(most.values()),
        depth=depth,
        kept=tuple(_least(trace.blocks, i) for i in samples),
        attention_tokens=_mean([(call.mean_tokens(call.attention), count) for call, count in ran]),
        mlp_tokens=_mean([(call.mean_tokens(call.mlp, call.mlp_rows), count) for call, count in ran]),
        heads=_mean([(call.heads, count) for call, count in ran]),
        channels=_mean([(call.channels, count) for call, count in ran]),
        reused=len(trace.cached.intersection(samples)),
        parts=parts,
        methods=methods,
        dense=dense,
    )


def _least(calls: Sequence[BlockTrace], sample: int) -> int | None:
    """The fewest image tokens that a block saw of a sample."""
    seen = [count for call in calls if (count := call.tokens_of(sample)) is not None]
    return min(seen, default=None)


def _scaled(costs: Sequence[tuple[Counter[str], float]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for cost, share in costs:
        total.update({part: round(share * value) for part, value in cost.items()})
    return total


def _mean(values: Sequence[tuple[float, int]]) -> float | None:
    weight = sum(count for _, count in values)
    return sum(value * count for value, count in values) / weight if weight else None


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
