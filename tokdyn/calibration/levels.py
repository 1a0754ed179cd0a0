"""Divide noise levels into intervals that hold neighbouring steps of recorded trajectories."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tokdyn.errors import InputError

LEVELS = 10
"""Default number of intervals, unless there are fewer steps."""


@dataclass(frozen=True)
class Bins:
    """Intervals of noise levels that cover 0 to 1 without gaps.

    Attributes:
        edges: rising from 0 to 1; one more than there are intervals.
    """

    edges: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def of(self, level: float) -> int:
        """Return the index of the interval that holds a noise level; levels outside of [0, 1] go to the nearest."""
        return min(max(bisect_right(self.edges, level) - 1, 0), len(self) - 1)

    def rows(self) -> list[tuple[float, float]]:
        """Return (low, high) of every interval."""
        return list(pairwise(self.edges))


def _between(low: float, high: float) -> float:
    """Return a number between two others, with few digits if possible."""
    middle = (low + high) / 2
    short = round(middle, 6)
    return short if low < short < high else middle


def bins_of(seen: Sequence[float], levels: int | Sequence[float] | None) -> Bins:
    """Divide noise levels into intervals with about equally many steps; edges lie halfway between steps.

    Args:
        seen: noise levels of all calls; calls of one step have equal levels.
        levels: the largest number of intervals, or the edges between them, rising within [0, 1]; None means 10.

    Raises:
        InputError: there are no intervals, edges do not rise, or nothing was recorded in an interval.
    """
    steps = sorted({min(max(level, 0.0), 1.0) for level in seen})
    if levels is None or isinstance(levels, int):
        wanted = LEVELS if levels is None else levels
        if wanted < 1:
            raise InputError(f"levels={wanted} gives no rows of noise levels; give at least 1.")
        count = min(wanted, len(steps))
        cuts = [round(len(steps) * row / count) for row in range(1, count)]
        inner = [_between(steps[cut - 1], steps[cut]) for cut in cuts]
        return Bins((0.0, *inner, 1.0))
    inner = [float(edge) for edge in levels if 0.0 < edge < 1.0]
    edges = (0.0, *inner, 1.0)
    if any(a >= b for a, b in pairwise(edges)) or any(not 0.0 <= edge <= 1.0 for edge in levels):
        raise InputError(f"levels={tuple(levels)} are no edges; give noise levels that rise from 0 to 1.")
    bins = Bins(edges)
    occupied = {bins.of(level) for level in steps}
    empty = [row for index, row in enumerate(bins.rows()) if index not in occupied]
    if empty:
        raise InputError(
            f"no call was recorded at noise levels from {empty[0][0]:g} to {empty[0][1]:g}; choose other levels, or "
            "record more steps."
        )
    return bins
