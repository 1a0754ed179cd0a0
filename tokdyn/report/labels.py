"""Place the labels of points so that none covers another, a marker or the legend."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from tokdyn.report.style import INK, MUTED

_DIRECTIONS = (35, 145, -35, -145, 90, -90, 0, 180)  # degrees, those that look best first
_DISTANCES = (7.0, 14.0, 24.0, 36.0, 50.0, 68.0)  # points
_LINE_FROM = 20.0  # distance in points from which a line leads to the label
_MARKER = 4.5  # half width of a marker in points
_MARGIN = 1.5  # pixels between texts


def place_labels(
    figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str]], avoid: Sequence[Artist] = ()
) -> None:
    """Write the label of each point near to it, inside of the axes; one for which there is no room is left out.

    It is called when everything else is drawn, because it looks where there is room.

    Args:
        figure: the figure.
        axes: the axes that the points are in.
        points: position and label of each point; a label "" is not written, but its point is not covered.
        avoid: what labels must not cover either, such as the legend.
    """
    figure.draw_without_rendering()  # settles the layout
    inside = axes.get_window_extent()
    pixels = figure.dpi / 72.0
    taken = [artist.get_window_extent() for artist in avoid]
    spots = [axes.transData.transform((x, y)) for x, y, _ in points]
    taken += [
        Bbox.from_extents(x - _MARKER * pixels, y - _MARKER * pixels, x + _MARKER * pixels, y + _MARKER * pixels)
        for x, y in spots
    ]
    for x, y, label in points:
        if not label:
            continue
        text = axes.annotate(
            label, (x, y), xytext=(0, 0), textcoords="offset points", fontsize="small", color=INK, zorder=4
        )
        text.set_in_layout(False)
        size = text.get_window_extent()
        spot = axes.transData.transform((x, y))
        for distance, angle in ((d, a) for d in _DISTANCES for a in _DIRECTIONS):
            across, up = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            offset = distance * across, distance * up
            sides = [0.0 if part > 0.2 else -1.0 if part < -0.2 else -0.5 for part in (across, up)]
            left = spot[0] + offset[0] * pixels + sides[0] * size.width
            bottom = spot[1] + offset[1] * pixels + sides[1] * size.height
            box = Bbox.from_bounds(left, bottom, size.width, size.height).padded(_MARGIN)
            within = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if within and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                text.set_position(offset)
                text.set_horizontalalignment("left" if sides[0] == 0.0 else "right" if sides[0] == -1.0 else "center")
                text.set_verticalalignment("bottom" if sides[1] == 0.0 else "top" if sides[1] == -1.0 else "center")
                if distance > _LINE_FROM:
                    line = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3}
                    axes.annotate(
                        "", (x, y), xytext=offset, textcoords="offset points", arrowprops=line, zorder=2
                    ).set_in_layout(False)
                break
        else:
            text.remove()
