"""Statistics of the last trajectory of a wrapped model, from the traces of its calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from torch import nn

from tokdyn.adapters.structure import structures
from tokdyn.attach import attached, inner_model
from tokdyn.cost.blocks import Costs
from tokdyn.cost.trajectory_stats import CallStats, TrajectoryStats
from tokdyn.trace.calls import BlockTrace, CallTrace
from tokdyn.trace.steps import halves_of, last_trajectory


def stats(model: nn.Module, guided: bool | None = None) -> TrajectoryStats:
    """Return what the last trajectory did and what it cost, while it goes on or after it has ended.

    It ends when a pipeline has made its images, when another image begins, or with `tokdyn.reset`. In training, every
    call is a trajectory. The last 512 calls are kept.

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
    trajectory = last_trajectory(attachment.history, attachment.adapter)
    if guided is None:  # a cached step asks for no budgets
        guided = any(call.trace.halves for call in trajectory)
    for call in trajectory:
        for name, samples in halves_of(call.trace, call.branch, attachment.adapter, guided):
            calls.append(_call(call.trace, call.step, name, call.levels, samples, costs, depth))
    return TrajectoryStats(type(model).__name__, tuple(calls))


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
