"""Which step and which guidance branch each call of the last run was, found from the records when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from tokdyn.adapters.base import ModelAdapter
from tokdyn.trace.calls import Record
from tokdyn.trace.trajectory import Trajectory


def turns(history: Sequence[Record], adapter: ModelAdapter) -> list[tuple[Record, int, str | int, tuple[float, ...]]]:
    """The calls of the last run, each with its step, its branch and the noise levels of its samples."""
    runs = [list(run) for there, run in groupby(history, key=lambda record: record.batch > 0) if there]
    placed: list[tuple[Record, int, str | int, tuple[float, ...]]] = []
    trajectory, number, training = Trajectory(), 0, False
    for record in runs[-1] if runs else ():
        level = tuple(record.clock.tolist())
        level = level * record.batch if len(level) == 1 else level
        if record.level is None:  # every call is a step
            placed.append((record, len(placed), record.branch or 0, level))
            continue
        if record.training or training:
            trajectory.clear()
        turn = trajectory.turn(level, record.branch)
        if turn.trajectory != number:
            placed, number, step = [], turn.trajectory, -1
        step += turn.place == 0
        placed.append((record, step, turn.branch if record.branch is not None else turn.place, level))
        training = record.training
    branches = {branch for _, _, branch, _ in placed}
    if branches == {0, 1} and adapter.guidance == "calls":
        names: tuple[str, str] = ("cond", "uncond")
        placed = [(record, step, names[int(branch)], level) for record, step, branch, level in placed]
    return placed


def halves_of(record: Record, branch: str | int, adapter: ModelAdapter, halves: bool) -> list[tuple[str | int, range]]:
    """The branches of guidance in a call, and their samples."""
    if not halves or record.batch % 2 or adapter.guidance == "calls":
        return [(branch, range(record.batch))]
    half = record.batch // 2
    first, second = adapter.halves
    return [(first, range(half)), (second, range(half, record.batch))]
