"""Compute the outlines of ten shapes as signed distances: negative inside, positive outside.

Every function takes coordinates x (to the right) and y (down), two arrays of equal shape in units of the shape's
radius, and returns an array of that shape in the same units. The shapes lie within the unit disc, up to a few
hundredths, and can still be told apart when they are mirrored or tilted a little. Some distances are those to the
nearest bounding line, not to the outline itself; both are zero on the outline.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]


def circle(x: Field, y: Field) -> Field:
    """Return the distance to a filled disc."""
    return np.hypot(x, y) - np.float32(0.92)


def square(x: Field, y: Field) -> Field:
    """Return the distance to a filled square."""
    return np.maximum(np.abs(x), np.abs(y)) - np.float32(0.74)


def triangle(x: Field, y: Field) -> Field:
    """Return the distance to a filled equilateral triangle with one corner on top."""
    slope = np.float32(np.sqrt(3) / 2)
    return np.maximum(slope * np.abs(x) - y / 2, y) - np.float32(0.5)


def star(x: Field, y: Field) -> Field:
    """Return the distance to a star with five points."""
    fifth = np.float32(2 * np.pi / 5)
    angle = np.arctan2(x, -y)
    folded = np.abs(angle - fifth * np.rint(angle / fifth))  # 0 at a point, pi/5 at a notch
    radius = np.hypot(x, y)
    notch = 0.42
    edge = np.array([notch * np.cos(np.pi / 5) - 1, notch * np.sin(np.pi / 5)])  # from the point to the notch
    across, along = (np.array([edge[1], -edge[0]]) / np.hypot(*edge)).astype(np.float32)
    distance: Field = (radius * np.cos(folded) - 1) * across + radius * np.sin(folded) * along
    return distance


def ring(x: Field, y: Field) -> Field:
    """Return the distance to a circle with a round hole."""
    return np.abs(np.hypot(x, y) - np.float32(0.71)) - np.float32(0.22)


def frame(x: Field, y: Field) -> Field:
    """Return the distance to a square with a square hole."""
    return np.abs(np.maximum(np.abs(x), np.abs(y)) - np.float32(0.57)) - np.float32(0.18)


def cross(x: Field, y: Field) -> Field:
    """Return the distance to an upright cross with equal arms."""
    long, short = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
    return np.maximum(long - np.float32(0.93), short - np.float32(0.27))


def heart(x: Field, y: Field) -> Field:
    """Return the distance to a heart: a square on its corner with a half disc on each upper side."""
    half = np.float32(0.55)
    y = y - np.float32(0.06)
    u, v = np.float32(np.sqrt(0.5)) * (x + y), np.float32(np.sqrt(0.5)) * (x - y)
    body = np.maximum(np.abs(u), np.abs(v)) - half
    lobes = np.minimum(np.hypot(u + half, v), np.hypot(u, v - half)) - half
    whole: Field = np.minimum(body, lobes)
    return whole


def crescent(x: Field, y: Field) -> Field:
    """Return the distance to a crescent moon: a disc without a second disc at its right."""
    disc, hole = np.hypot(x, y) - np.float32(0.95), np.hypot(x - np.float32(0.5), y) - np.float32(0.72)
    rest: Field = np.maximum(disc, -hole)
    return rest


def hourglass(x: Field, y: Field) -> Field:
    """Return the distance to an hourglass: two triangles that meet at their tips."""
    slope = np.float32(0.85)
    sides = (np.abs(x) - slope * np.abs(y) - np.float32(0.06)) / np.float32(np.sqrt(1 + slope**2))
    both: Field = np.maximum(np.abs(y) - np.float32(0.78), sides)
    return both


OUTLINES: dict[str, Callable[[Field, Field], Field]] = {
    outline.__name__: outline
    for outline in (circle, square, triangle, star, ring, cross, heart, crescent, hourglass, frame)
}
