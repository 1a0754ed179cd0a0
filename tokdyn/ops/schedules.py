"""Settings that change with the noise level: a number, or points with linear interpolation between them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

from tokdyn.errors import InputError

Curve = float | tuple[tuple[float, float], ...]
"""A value for all noise levels, or points (level, value) with rising levels; 1 is pure noise, 0 the clean image."""


def check_curve(curve: Curve, least: float, most: float) -> None:
    """Check the points of a curve.

    Raises:
        InputError: there is no point, levels do not rise within [0, 1], or a value lies outside [least, most].
    """
    points: Sequence[tuple[float, float]] = ((0.0, curve),) if isinstance(curve, (int, float)) else curve
    if not points:
        raise InputError("the curve has no point; give a number or points (noise level, value).")
    if not all(0.0 <= level <= 1.0 for level, _ in points) or any(a[0] >= b[0] for a, b in pairwise(points)):
        raise InputError(f"the levels of the curve {curve} should rise from point to point within [0, 1].")
    if not all(least <= value <= most for _, value in points):
        raise InputError(f"the values of the curve {curve} should lie within [{least:g}, {most:g}].")


def at(curve: Curve, level: float) -> float:
    """Evaluate a curve at a noise level; it is constant before the first point and after the last."""
    if isinstance(curve, (int, float)):
        return float(curve)
    place = bisect_right([point[0] for point in curve], level)
    if place == 0 or place == len(curve):
        return float(curve[max(place - 1, 0)][1])
    (low, below), (high, above) = curve[place - 1], curve[place]
    return below + (above - below) * (level - low) / (high - low)
