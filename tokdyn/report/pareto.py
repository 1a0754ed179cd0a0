"""Draw quality against cost, with the Pareto frontier, from rows of JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict

from tokdyn.errors import DataError, InputError
from tokdyn.reading import one_line, read_json
from tokdyn.report.charts import Line, chart
from tokdyn.report.html import Html
from tokdyn.report.labels import place_labels
from tokdyn.report.style import COLOURS, MARKERS, MUTED, figure_style, save_figure, with_drawable_letters


class ParetoPoint(BaseModel):
    """The cost and the quality of one model with one choice of settings.

    Attributes:
        series: name of the line that the point belongs to.
        label: text beside the point.
        cost: tokens, FLOPs or seconds per image; less is better.
        quality: a distance (lower is better) or a score (higher is better).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    series: str
    label: str = ""
    cost: float
    quality: float


def read_points(path: Path, cost: str, quality: str, series: str = "model", label: str = "label") -> list[ParetoPoint]:
    """Read points from a JSON file that holds a list of objects, or an object with such a list under ``rows``.

    All keys may have dots, which lead into nested objects.

    Args:
        path: path of the file.
        cost: key of the cost.
        quality: key of the quality.
        series: key of the name of the line.
        label: key of the text beside the point; a row without it gets no text.

    Raises:
        DataError: the file is not such a list, or a row lacks a key.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as JSON ({one_line(error)}): give a JSON file with a list of rows."
        ) from error
    rows = content.get("rows") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DataError(
            f"{path} does not hold a list of rows, expected [{{...}}, ...] or {{'rows': [{{...}}, ...]}}: give such a "
            "file."
        )
    points = []
    for number, row in enumerate(rows):
        values = {name: _look_up(row, key) for name, key in (("cost", cost), ("quality", quality), ("series", series))}
        for name, key in (("cost", cost), ("quality", quality)):
            if isinstance(values[name], bool) or not isinstance(values[name], int | float):
                raise DataError(
                    f"{path}: row {number} has no number under '{key}', its keys are {', '.join(sorted(row))}: name "
                    "one of these."
                )
        if values["series"] is None:
            raise DataError(
                f"{path}: row {number} has nothing under '{series}', its keys are {', '.join(sorted(row))}: name one "
                "of these."
            )
        text = _look_up(row, label)
        points.append(
            ParetoPoint(
                series=str(values["series"]),
                label="" if text is None else str(text),
                cost=values["cost"],
                quality=values["quality"],
            )
        )
    return points


def frontier(points: Sequence[ParetoPoint], higher_is_better: bool = False) -> list[ParetoPoint]:
    """Return the points that no other point beats in both cost and quality, in order of ascending cost."""
    sign = -1.0 if higher_is_better else 1.0
    best, optimal = math.inf, []
    for point in sorted(points, key=lambda point: (point.cost, sign * point.quality)):
        if sign * point.quality < best:
            best = sign * point.quality
            optimal.append(point)
    return optimal


def draw_pareto(
    points: Sequence[ParetoPoint],
    path: Path,
    cost_name: str,
    quality_name: str,
    title: str = "Quality against cost",
    higher_is_better: bool = False,
    note: str = "",
    joined: bool = True,
    column: bool = False,
) -> Path:
    """Draw one line per series through its points in order of ascending cost, and the Pareto frontier behind them.

    Args:
        points: the points to draw.
        path: path of the file to write.
        cost_name: label of the horizontal axis, with the unit.
        quality_name: label of the vertical axis, with the network if it is a distance.
        title: title of the figure.
        higher_is_better: whether a higher quality value is better.
        note: small text below the axes, such as the machine and the settings.
        joined: connect the points of a series by lines.
        column: make the figure as wide as a column of a paper, without a title.

    Returns:
        `path`.

    Raises:
        InputError: there are no points.
    """
    if not points:
        raise InputError("There are no points to draw: give at least one.")
    names = list(dict.fromkeys(point.series for point in points))
    with figure_style(column):
        figure = Figure(figsize=(3.4, 2.6) if column else (6.8, 4.4), layout="constrained")
        axes = figure.subplots()
        _draw_frontier(axes, frontier(points, higher_is_better), points)
        for index, name in enumerate(names):
            members = sorted((point for point in points if point.series == name), key=lambda point: point.cost)
            axes.plot(
                [point.cost for point in members],
                [point.quality for point in members],
                color=COLOURS[index % len(COLOURS)],
                linestyle="-" if joined else "none",
                marker=MARKERS[index % len(MARKERS)],
                markersize=5 if column else 7,
                markeredgecolor="white",
                label=with_drawable_letters(name),
                zorder=3,
            )
        axes.set_xlabel(cost_name)
        axes.set_ylabel(f"{quality_name}\n({'higher' if higher_is_better else 'lower'} is better)")
        axes.margins(x=0.1, y=0.12)
        if not column:
            axes.set_title(title)
        legend = axes.legend(loc="best", fontsize="small")
        if note:
            figure.supxlabel(note, x=0.01, ha="left", fontsize="small", color=MUTED)
        labelled = [(point.cost, point.quality, with_drawable_letters(point.label)) for point in points]
        place_labels(figure, axes, labelled, [legend])
        return save_figure(figure, path)


def pareto_chart(
    points: Sequence[ParetoPoint], cost_name: str, quality_name: str, higher_is_better: bool = False
) -> Html:
    """Return the same as a chart of a page, which shows the label of a point under the pointer; arguments as above."""
    lines = []
    for name in dict.fromkeys(point.series for point in points):
        own = sorted((point for point in points if point.series == name), key=lambda point: point.cost)
        values = [point.cost for point in own], [point.quality for point in own]
        lines.append(Line(name, *values, [point.label for point in own], joined=False))
    front = [(point.cost, point.quality) for point in frontier(points, higher_is_better)]
    title = f"{quality_name} ({'higher' if higher_is_better else 'lower'} is better)"
    return chart(lines, title, cost_name, quality_name, front=front)


def _draw_frontier(axes: Axes, best: Sequence[ParetoPoint], points: Iterable[ParetoPoint]) -> None:
    """Draw the best quality that is reached at each cost or less, as a staircase."""
    right = max(point.cost for point in points)
    costs, qualities = [*(point.cost for point in best), right], [*(point.quality for point in best), best[-1].quality]
    axes.step(costs, qualities, where="post", color="#cfcfcf", linewidth=3, zorder=1, label="Pareto frontier")


def _look_up(row: Mapping[str, Any], key: str) -> Any:
    """Return the value under a key, or under nested keys joined by dots; None if there is none."""
    if key in row:
        return row[key]
    head, _, rest = key.partition(".")
    inner = row.get(head)
    return _look_up(inner, rest) if rest and isinstance(inner, Mapping) else None
