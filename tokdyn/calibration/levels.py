"""Noise levels in rows: the steps of recorded trajectories, neighbours together."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from tokdyn.errors import InputError

LEVELS = 10
"""Rows of noise levels, unless there are fewer steps or the user says otherwise."""


@dataclass(frozen=True)
class Bins:
    """Stretches of noise levels that cover 0 to 1 without holes.

    Attributes:
        edges: rising, from 0 to 1; one more than there are stretches.
    """

    edges: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.edges) - 1

    def of(self, level: float) -> int:
        """The stretch of a noise level; what lies outside of 0 to 1 belongs to the nearest."""
        return min(max(bisect_right(self.edges, level) - 1, 0), len(self) - 1)

    def rows(self) -> list[tuple[float, float]]:
        """(low, high) of every stretch."""
        return list(pairwise(self.edges))


def _between(low: float, high: float) -> float:
    """The middle, with few digits where they are enough."""
    middle = (low + high) / 2
    short = round(middle, 6)
    return short if low < short < high else middle


def bins_of(seen: Sequence[float], levels: int | Sequence[float] | None) -> Bins:
    """Stretches with about equally many of the steps in each, their edges halfway between steps.

    Args:
        seen: noise levels of all calls; those of one step are equal.
        levels: how many stretches there may be, or edges between them, rising within 0 to 1; None is 10 stretches.

    Raises:
        InputError: none, edges that do not rise, or a stretch in which nothing was recorded.
    """
    steps = sorted({min(max(level, 0.0), 1.0) for level in seen})
    if levels is None or isinstance(levels, int):
        wanted = LEVELS if levels is None else levels
        if wanted < 1:
            raise InputError(f"levels is {wanted}; give the number of rows of noise levels, at least 1.")
        count = min(wanted, len(steps))
        cuts = [round(len(steps) * row / count) for row in range(1, count)]
        inner = [_between(steps[cut - 1], steps[cut]) for cut in cuts]
        return Bins((0.0, *inner, 1.0))
    inner = [float(edge) for edge in levels if 0.0 < edge < 1.0]
    edges = (0.0, *inner, 1.0)
    if any(a >= b for a, b in pairwise(edges)) or any(not 0.0 <= edge <= 1.0 for edge in levels):
        raise InputError(f"the edges {tuple(levels)} should rise within 0 to 1.")
    bins = Bins(edges)
    there = {bins.of(level) for level in steps}
    empty = [row for index, row in enumerate(bins.rows()) if index not in there]
    if empty:
        raise InputError(
            f"no call was recorded at noise levels {empty[0][0]:g} to {empty[0][1]:g}; choose other levels, or record "
            "more steps."
        )
    return bins
