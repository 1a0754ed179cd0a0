"""Draw charts of pages as SVG: lines and points with values under the pointer, and bars of parts.

Colours come from the style of the page, so that they fit a light and a dark one. No text is drawn beside points, so
that labels cannot overlap: names are in a legend below, values appear under the pointer or with the arrow keys.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tokdyn.report.html import Html, tag

_WIDTH, _HEIGHT = 480.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 16.0, 30.0, 54.0
_TICKS = 5
_MARKS = (
    "M-5,0A5,5 0 1,1 5,0A5,5 0 1,1 -5,0Z",
    "M-4.5,-4.5H4.5V4.5H-4.5Z",
    "M0,-6L6,0L0,6L-6,0Z",
    "M0,-6L5.5,4.5H-5.5Z",
)
_MOST_MARKS = 30  # points of a line that get marks; longer lines are drawn without
_MOST_POINTS = 400  # of a line; longer ones are thinned
COLOURS = 7  # of series, in page.css


@dataclass(frozen=True)
class Line:
    """A series of a chart.

    Attributes:
        name: name in the legend.
        x: positions.
        y: values; those that are not finite are left out.
        notes: for each point, what else the pointer shows; empty for nothing.
        joined: whether the points are connected.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    notes: Sequence[str] = ()
    joined: bool = True


def ticks(low: float, high: float, count: int = _TICKS) -> list[float]:
    """Return about `count` round numbers from `low` to `high`, at least two; the outer ones enclose the range."""
    if not high > low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(rough))
    step = scale * next(size for size in (1.0, 2.0, 5.0, 10.0) if size * scale >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def number(value: float) -> str:
    """Return a value with four digits, without an exponent where that is short."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def chart(
    lines: Sequence[Line],
    title: str,
    x_label: str,
    y_label: str,
    backwards: bool = False,
    front: Sequence[tuple[float, float]] = (),
) -> Html:
    """Return a chart of lines or points, with a legend if there are several.

    Args:
        lines: the series.
        title: title above the axes.
        x_label: label of the horizontal axis, with the unit.
        y_label: label of the vertical axis, with the unit.
        backwards: whether x falls from left to right, as noise levels do.
        front: the points of a Pareto front, drawn behind as a staircase.

    Returns:
        The chart; "" if no line has a finite point.
    """
    lines = [line for line in map(_finite, lines) if line.x]
    if not lines:
        return Html("")
    x_ticks = ticks(min(min(line.x) for line in lines), max(max(line.x) for line in lines))
    y_ticks = ticks(min(min(line.y) for line in lines), max(max(line.y) for line in lines))

    def across(value: float) -> float:
        share = (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])
        return _LEFT + (1.0 - share if backwards else share) * (_WIDTH - _LEFT - _RIGHT)

    def up(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    drawn = [tag("text", title, x=0, y=15, class_="title"), *_axes(x_ticks, y_ticks, across, up, x_label, y_label)]
    if front:
        path = "".join(f"H{across(x):.1f}V{up(y):.1f}" for x, y in front[1:])
        drawn.append(
            tag("path", d=f"M{across(front[0][0]):.1f},{up(front[0][1]):.1f}{path}H{_WIDTH - _RIGHT}", class_="front")
        )
    points: list[tuple[float, float, str]] = []
    for place, line in enumerate(lines):
        colour, spots = f"c{place % COLOURS}", [(across(x), up(y)) for x, y in zip(line.x, line.y, strict=True)]
        if line.joined and len(spots) > 1:
            drawn.append(tag("path", d="M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in spots), class_=f"line {colour}"))
        if not line.joined or len(spots) <= _MOST_MARKS:
            mark = _MARKS[place % len(_MARKS)]
            drawn += [
                tag("path", d=mark, transform=f"translate({x:.1f} {y:.1f})", class_=f"mark {colour}") for x, y in spots
            ]
        for index, (x, y) in enumerate(spots):
            note = f"\n{line.notes[index]}" if index < len(line.notes) else ""
            text = f"{line.name}{note}\n{x_label}: {number(line.x[index])}\n{y_label}: {number(line.y[index])}"
            points.append((round(x, 1), round(y, 1), text))
    svg = tag(
        "svg",
        *drawn,
        viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}",
        role="img",
        aria_label=f"{title}: {y_label} against {x_label}. Arrow keys read the points.",
        tabindex="0",
        data_points=json.dumps(points),
        data_span=json.dumps(
            [across(x_ticks[0]), across(x_ticks[-1]), x_ticks[0], x_ticks[-1], _TOP, _HEIGHT - _BOTTOM]
        ),
    )
    names = [line.name for line in lines]
    return tag("div", svg, names_legend(names) if len(lines) > 1 else "", class_="chart")


def names_legend(names: Sequence[str], bars: bool = False) -> Html:
    """Return the legend of series: a mark of the colour and form that they have in the chart, and the name."""
    items = []
    for place, name in enumerate(names):
        form = "M-6,-6H6V6H-6Z" if bars else _MARKS[place % len(_MARKS)]
        sample = tag("path", d=form, class_=f"mark c{place % COLOURS}")
        items.append(tag("li", tag("svg", sample, viewBox="-8 -8 16 16", aria_hidden="true"), name))
    return tag("ul", *items, class_="legend")


def bars(rows: Mapping[str, Mapping[str, float]], title: str, unit: str) -> Html:
    """Return one bar for each row, divided into parts; the pointer shows the values.

    Args:
        rows: the values of the parts by name, for each row by its name.
        title: title above the bars.
        unit: unit of the values.
    """
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    most = max((sum(parts.values()) for parts in rows.values()), default=0.0)
    if most <= 0.0:
        return Html("")
    height = _TOP + 52.0 * len(rows) + 4.0
    drawn: list[Html] = [tag("text", title, x=0, y=15, class_="title")]
    points: list[tuple[float, float, str]] = []
    for place, (row, parts) in enumerate(rows.items()):
        top, total, left = _TOP + 52.0 * place, sum(parts.values()), 0.0
        drawn.append(tag("text", f"{_short(row)}: {number(total)} {unit}", x=0, y=top + 15))
        for name, value in parts.items():
            width = value / most * _WIDTH
            colour = f"c{names.index(name) % COLOURS}"
            drawn.append(
                tag(
                    "rect",
                    x=f"{left:.1f}",
                    y=top + 21,
                    width=f"{max(width - 1.0, 0.0):.1f}",
                    height=20,
                    class_=f"bar {colour}",
                )
            )
            share = f"{value / total:.1%}" if total else ""
            points.append((round(left + width / 2, 1), top + 31, f"{row}, {name}\n{number(value)} {unit} ({share})"))
            left += width
    svg = tag(
        "svg", *drawn, viewBox=f"0 0 {_WIDTH:g} {height:g}", role="img", tabindex="0", data_points=json.dumps(points),
        aria_label=f"{title}, {unit}, by part. Arrow keys read the parts.",
    )  # fmt: skip
    return tag("div", svg, names_legend(names, bars=True), class_="chart")


def _axes(
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    across: Callable[[float], float],
    up: Callable[[float], float],
    x_label: str,
    y_label: str,
) -> list[Html]:
    """Return grid lines, tick labels and axis labels."""
    bottom = _HEIGHT - _BOTTOM
    drawn = []
    for value in y_ticks:
        drawn.append(
            tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=f"{up(value):.1f}", y2=f"{up(value):.1f}", class_="grid")
        )
        drawn.append(tag("text", number(value), x=_LEFT - 7, y=f"{up(value) + 4.5:.1f}", text_anchor="end"))
    for value in x_ticks:
        spot = across(value)
        anchor = "end" if spot > _WIDTH - _RIGHT - 8 else "middle"
        shift = spot + (_RIGHT if anchor == "end" else 0.0)
        drawn.append(tag("line", x1=f"{spot:.1f}", x2=f"{spot:.1f}", y1=bottom, y2=bottom + 4, class_="grid"))
        drawn.append(tag("text", number(value), x=f"{shift:.1f}", y=bottom + 22, text_anchor=anchor))
    drawn.append(tag("text", x_label, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 8, text_anchor="middle"))
    middle = (_TOP + bottom) / 2
    drawn.append(tag("text", y_label, transform=f"translate(13 {middle}) rotate(-90)", text_anchor="middle"))
    return drawn


def _finite(line: Line) -> Line:
    """Return the line with its finite points alone, and thinned if there are very many."""
    good = [
        place for place, (x, y) in enumerate(zip(line.x, line.y, strict=True)) if math.isfinite(x) and math.isfinite(y)
    ]
    step = -(-len(good) // _MOST_POINTS) if good else 1
    good = sorted({*good[::step], *good[-1:]})
    notes = [line.notes[place] for place in good] if line.notes else ()
    return Line(line.name, [line.x[i] for i in good], [line.y[i] for i in good], notes, line.joined)


def _short(name: str) -> str:
    """Return a name that fits above a bar."""
    return name if len(name) <= 44 else f"{name[:43]}…"
