"""The last trajectory of a model from the traces of its calls: steps, guidance branches and noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from tokdyn.adapters.base import ModelAdapter
from tokdyn.trace.branches import COND, UNCOND, split
from tokdyn.trace.calls import CallTrace
from tokdyn.trace.comparison import SAME
from tokdyn.trace.observation import SampleSeen
from tokdyn.trace.trajectory import Tracker


@dataclass(frozen=True)
class PlacedCall:
    """A call and its place in the trajectory.

    Attributes:
        trace: of the call.
        step: counted from 0.
        branch: of guidance: the name that the pipeline gave, or the place among the calls of the step.
        levels: (B) noise levels.
    """

    trace: CallTrace
    step: int
    branch: str | int
    levels: tuple[float, ...]


def last_trajectory(history: Sequence[CallTrace], adapter: ModelAdapter) -> list[PlacedCall]:
    """Place the calls of the last trajectory, which in training is one call.

    Args:
        history: traces in order; an empty one separates trajectories.
        adapter: of the model, which knows how its pipelines ask for guidance.
    """
    trajectories = [
        list(calls) for has_calls, calls in groupby(history, key=lambda trace: trace.batch > 0) if has_calls
    ]
    placed: list[PlacedCall] = []
    tracker, trajectory, step = Tracker(), -1, -1
    for trace in trajectories[-1] if trajectories else ():
        levels = tuple(trace.levels.tolist())
        levels = levels * trace.batch if len(levels) == 1 else levels
        if trace.level is None:  # every call is a step
            placed.append(PlacedCall(trace, len(placed), trace.branch or 0, levels))
            continue
        if trace.training:
            tracker.clear()
            placed, trajectory = [PlacedCall(trace, 0, trace.branch or 0, levels)], -1
            continue
        if trace.observed is None:  # a graph of torch.compile had no room for an observation
            position = tracker.place([SampleSeen(level, SAME, 0.0) for level in levels])
        else:
            position = tracker.place(trace.observed.samples, trace.observed.branch, trace.observed.step)
        if position.trajectory != trajectory:
            placed, trajectory, step = [], position.trajectory, -1
        told = None if trace.observed is None else trace.observed.step
        step = step + (position.place == 0) if told is None else told
        placed.append(PlacedCall(trace, step, position.place if trace.branch is None else trace.branch, levels))
    unnamed = {call.branch for call in placed} - {COND, UNCOND}
    two = unnamed == {0, 1} and adapter.guidance == "calls"
    if not unnamed <= {0, 1}:
        return placed
    return [_named(call) if two or _is_of_one_branch(call.trace) else call for call in placed]


def _is_of_one_branch(trace: CallTrace) -> bool:
    """Whether a pipeline said that a call is about one branch, which it did not name: the conditional one is first."""
    return trace.observed is not None and trace.observed.parts == ()


def _named(call: PlacedCall) -> PlacedCall:
    """Name the branch of the first or the second call of a step."""
    return call if isinstance(call.branch, str) else replace(call, branch=(COND, UNCOND)[call.branch])


def halves_of(
    trace: CallTrace, branch: str | int, adapter: ModelAdapter, halves: bool
) -> list[tuple[str | int, range]]:
    """List the guidance branches in a call, and the samples of each.

    Args:
        trace: of the call.
        branch: of the call as a whole.
        adapter: of the model, which knows the order of two branches in a batch.
        halves: whether batches hold two branches, where nobody said so.
    """
    parts = None if trace.observed is None else trace.observed.parts
    if parts is not None:
        named = split(trace.batch, parts)
        return [(branch, range(trace.batch))] if named is None else [*named]
    if not halves or trace.batch % 2 or adapter.guidance == "calls":
        return [(branch, range(trace.batch))]
    half = trace.batch // 2
    first, second = adapter.halves
    return [(first, range(half)), (second, range(half, trace.batch))]
