"""Compute statistics of the last trajectory of a wrapped model from the traces of its calls."""

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
    """Return what the last trajectory computed and what it cost, during it or after its end.

    A trajectory ends when a diffusers pipeline has made its images, when another image begins, or with `tokdyn.reset`.
    In training, every call is one. The last 512 calls are kept.

    Args:
        model: a wrapped model.
        guided: whether each batch held the two guidance branches as halves, which then have entries of their own. None
            assumes so if a tail drop was set for each branch.

    Returns:
        One entry for each call and guidance branch, empty before the first call; printed, it is a table.

    Raises:
        InputError: the model is not wrapped.
    """
    attachment, model = attached(model), inner_model(model)
    known = structures(model, attachment.adapter)
    costs, depth = None if known is None else Costs(known), attachment.blueprint.sizes.depth
    calls: list[CallStats] = []
    trajectory = last_trajectory(attachment.history, attachment.adapter)
    if guided is None:  # not every call shows it: in a cached step no tail drop is read
        guided = any(call.trace.halves for call in trajectory)
    for call in trajectory:
        for name, samples in halves_of(call.trace, call.branch, attachment.adapter, guided):
            calls.append(_call(call.trace, call.step, name, call.levels, samples, costs, depth))
    pipeline = attachment.trajectory.pipeline
    ended = not attachment.history[-1].batch  # a call since then belongs to no pipeline
    short: dict[str, tuple[float, float]] = {}
    for call in trajectory:
        for method, (asked, reached, size) in call.trace.shortfalls.items():
            short.setdefault(method, (asked, reached / size))
    return TrajectoryStats(type(model).__name__, tuple(calls), pipeline.seconds if pipeline and ended else None, short)


def _call(
    trace: CallTrace,
    step: int,
    branch: str | int,
    level: tuple[float, ...],
    samples: range,
    costs: Costs | None,
    depth: int,
) -> CallStats:
    """Compute the statistics of some samples of a call.

    Args:
        trace: the trace of the call.
        step: number of its step.
        branch: guidance branch of these samples.
        level: noise level of every sample of the batch.
        samples: positions of these samples in the batch.
        costs: costs of the model's blocks; None if they cannot be computed.
        depth: number of blocks.
    """
    ran = [(part, count) for call in trace.blocks for part, count in [call.among(samples)] if count]
    most: dict[int, int] = {}
    for call, _ in ran:
        most[call.block] = max(call.tokens, most.get(call.block, 0))
    share = len(samples) / trace.batch if trace.batch else 0.0
    parts = methods = dense = None
    if costs is not None:
        parts = dict(_scaled([(costs.of(call), count / call.samples) for call, count in ran]))
        methods = dict(_scaled([(costs.methods(trace), share)]))
        dense = dict(_scaled([(costs.dense(trace), share)]))
    timed = trace.observed
    return CallStats(
        step=step,
        branch=branch,
        level=None if trace.level is None else sum(level[i] for i in samples) / len(samples) if samples else 0.0,
        samples=len(samples),
        cells=trace.cells,
        blocks=tuple(most),
        tokens=tuple(most.values()),
        depth=depth,
        kept=tuple(_fewest_tokens(trace.blocks, i) for i in samples),
        attention_tokens=_mean([(call.mean_tokens(call.attention), count) for call, count in ran]),
        mlp_tokens=_mean([(call.mean_tokens(call.mlp, call.mlp_rows), count) for call, count in ran]),
        heads=_mean([(call.heads, count) for call, count in ran]),
        channels=_mean([(call.channels, count) for call, count in ran]),
        reused=len(trace.cached.intersection(samples)),
        parts=parts,
        methods=methods,
        dense=dense,
        seconds=None if timed is None or timed.seconds is None else share * timed.seconds,
        dense_seconds=None if timed is None or timed.dense_seconds is None else share * timed.dense_seconds,
        cache_bytes=round(share * trace.cache_bytes),
    )


def _fewest_tokens(calls: Sequence[BlockTrace], sample: int) -> int | None:
    """Return the fewest image tokens of a sample that a block computed; None if no block ran for it."""
    counts = [count for call in calls if (count := call.tokens_of(sample)) is not None]
    return min(counts, default=None)


def _scaled(costs: Sequence[tuple[Counter[str], float]]) -> Counter[str]:
    """Add up FLOPs by part, each multiplied by a share."""
    total: Counter[str] = Counter()
    for cost, share in costs:
        total.update({part: round(share * value) for part, value in cost.items()})
    return total


def _mean(values: Sequence[tuple[float, int]]) -> float | None:
    """Return the mean of values with weights; None if there are none."""
    weight = sum(count for _, count in values)
    return sum(value * count for value, count in values) / weight if weight else None
