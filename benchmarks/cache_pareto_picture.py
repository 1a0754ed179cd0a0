"""Draw the result of `benchmarks.cache_pareto`: quality against time, a colour per rule and a marker per companion."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from tokdyn.report.pareto import ParetoPoint, frontier
from tokdyn.report.style import COLOURS, INK, MUTED, figure_style, save_figure

INKS = (INK, *COLOURS[:6], "#6A3D9A", "#8C510A", "#7F7F7F", "#B2182B")
"""Colours of the rules in the order of the rows; the first is that of the model without a cache."""
SHAPES = ("o", "s", "^")
Row = dict[str, Any]


def draw(content: Row, path: Path) -> Path:
    """Draw three panels: the distance to the reference against time, and against FLOPs, and PSNR against time.

    Args:
        content: settings, name of the quality and rows, as the benchmark writes them.
        path: path of the picture.
    """
    rows, distance, settings = content["rows"], content["quality"], content["settings"]
    time, flops = "ms per image", "GFLOPs per image"
    values: dict[str, list[float | None]] = {
        time: [row["milliseconds"] for row in rows],
        flops: [1e3 * row["tflops_per_image"] for row in rows],
        distance: [row["values"][distance] for row in rows],
        "PSNR": [None if row["psnr"] is None else float(row["psnr"]) for row in rows],
    }
    with figure_style():
        figure = Figure(figsize=(11.5, 6.6), layout="constrained")
        panels = figure.subplot_mosaic([["time", "psnr"], ["time", "flops"]], width_ratios=[1.7, 1])
        for name, cost, quality, title, higher in (
            ("time", time, distance, f"{distance}, lower is better", False),
            ("psnr", time, "PSNR", "PSNR to no methods, dB, higher is better", True),
            ("flops", flops, distance, f"{distance}, lower is better", False),
        ):
            axes = panels[name]
            _scatter(axes, rows, values[cost], values[quality], higher)
            axes.set_xlabel(cost)
            axes.set_title(title, fontsize=9, fontweight="normal")
            axes.margins(0.06)
        figure.suptitle("Caching rules alone, with TokenMerge and with DepthSkip", x=0.01, ha="left", weight="bold")
        figure.legend(handles=_handles(rows), loc="outside right upper", fontsize=8.5)
        note = (
            f"{rows[0]['model']}: {settings['count']:,} images from equal seeds, {settings['steps']} steps of "
            f"{settings['scheduler']}, guidance {settings['guidance']:g}, {settings['precision']}; a multiply-add is 2 "
            "FLOPs. Lines join the budgets of a rule; the grey staircase is the best quality at each cost or less."
        )
        figure.supxlabel(note, x=0.01, ha="left", fontsize=7.5, color=MUTED)
        return save_figure(figure, path)


def _scatter(
    axes: Axes, rows: Sequence[Row], costs: Sequence[float | None], qualities: Sequence[float | None], higher: bool
) -> None:
    """Draw the points that have both values, lines between the budgets of a rule, and the frontier behind them."""
    both = list(zip(rows, costs, qualities, strict=True))
    known = [(row, x, y) for row, x, y in both if x is not None and y is not None and math.isfinite(y)]
    best = frontier([ParetoPoint(series=row["name"], cost=x, quality=y) for row, x, y in known], higher)
    if best:
        right = max(x for _, x, _ in known)
        edge = [*((point.cost, point.quality) for point in best), (right, best[-1].quality)]
        axes.step(*zip(*edge, strict=True), where="post", color="#d4d4d4", linewidth=4, zorder=1)
    inks, shapes = _inks(rows), _shapes(rows)
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row, x, y in known:
        lines.setdefault((row["rule"], row["companion"]), []).append((x, y))
        ink = inks[row["rule"]]
        axes.plot(
            x, y, linestyle="none", marker=shapes[row["companion"]], markersize=7, markeredgecolor=ink,
            markerfacecolor=ink if _is_filled(row, rows) else "white", markeredgewidth=1.4, zorder=3,
        )  # fmt: skip
    for (rule, _), line in lines.items():
        axes.plot(*zip(*line, strict=True), color=inks[rule], linewidth=0.9, alpha=0.3, zorder=2)


def _is_filled(row: Row, rows: Sequence[Row]) -> bool:
    """Whether a row has the largest budget of its rule; the markers of others are hollow."""
    return bool(row["budget"] == max(each["budget"] for each in rows if each["rule"] == row["rule"]))


def _inks(rows: Sequence[Row]) -> dict[str, str]:
    """Return the colour of each rule."""
    rules = dict.fromkeys(row["rule"] for row in rows)
    return {rule: INKS[number % len(INKS)] for number, rule in enumerate(rules)}


def _shapes(rows: Sequence[Row]) -> dict[str, str]:
    """Return the marker of each companion."""
    companions = dict.fromkeys(row["companion"] for row in rows)
    return {companion: SHAPES[number % len(SHAPES)] for number, companion in enumerate(companions)}


def _handles(rows: Sequence[Row]) -> list[Line2D]:
    """Return the entries of the legend: colours of rules, markers of companions, and filled or hollow for budgets."""

    def entry(text: str, shape: str, ink: str, face: str) -> Line2D:
        return Line2D(
            [], [], linestyle="none", marker=shape, markersize=7, markeredgecolor=ink, markerfacecolor=face, label=text
        )

    def entries() -> Iterator[Line2D]:
        for rule, ink in _inks(rows).items():
            yield entry(rule, "o", ink, ink)
        yield entry("", "None", INK, INK)
        for companion, shape in _shapes(rows).items():
            yield entry(companion if companion == "alone" else f"with {companion}", shape, MUTED, MUTED)
        yield entry("", "None", INK, INK)
        budgets = sorted({row["budget"] for row in rows if row["budget"] < 1}, reverse=True)
        for number, budget in enumerate(budgets):
            yield entry(f"{budget:.0%} of the steps computed", "o", MUTED, "white" if number else MUTED)

    return list(entries())
