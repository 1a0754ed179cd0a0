"""Show the times that `tokdyn bench speed` measured as a table, as JSON and as curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tokdyn.bench import timing
from tokdyn.bench.settings import SpeedConfig
from tokdyn.bench.speed import NO_CURVE, SpeedRow, growth
from tokdyn.errors import InputError
from tokdyn.report.style import COLOURS, MARKERS, figure_style, save_figure


def columns(rows: Sequence[SpeedRow]) -> dict[str, list[str]]:
    """Return the columns of the table by title, each with one text per row.

    Settings that are equal in all rows are left out, and so are empty columns.
    """
    settings = {
        name: [_text(getattr(row.case, name)) for row in rows]
        for name in ("mode", "precision", "compile", "size", "kept", "batch")
    }
    table = {
        "stack": [row.stack for row in rows],
        **{name: texts for name, texts in settings.items() if len(set(texts)) > 1},
        "tokens": [str(row.tokens) for row in rows],
        "ms": [f"{row.milliseconds:.2f}" for row in rows],
        "spread": [f"{row.spread:.0%}" for row in rows],
        "images/s": [f"{row.images_per_second:.1f}" for row in rows],
        "GFLOPs": [f"{row.gflops:.2f}" for row in rows],
        "GFLOP/s": [f"{row.gflops_per_second:.0f}" for row in rows],
        "speed-up": [f"{row.speedup:.2f}" for row in rows],
        "of the FLOPs": [f"{row.realised:.2f}" for row in rows],
        "peak, MiB": ["-" if row.peak_mib is None else f"{row.peak_mib:.0f}" for row in rows],
    }
    one_stack = len({row.stack for row in rows}) == 1
    hidden = {"speed-up", "of the FLOPs"} if one_stack else set()
    return {name: cells for name, cells in table.items() if name not in hidden and any(cell != "-" for cell in cells)}


def _text(value: Any) -> str:
    """Return a setting as text, "-" for None."""
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def content(config: SpeedConfig, rows: Sequence[SpeedRow]) -> dict[str, Any]:
    """Return the result for JSON: machine, settings, rows, and the exponents of time against tokens and batch."""
    return {
        "machine": timing.machine(),
        "units": "milliseconds per call or training step; a multiply-add is 2 FLOPs",
        "settings": config.model_dump(mode="json"),
        "rows": [asdict(row) for row in rows],
        "growth": {"tokens": growth(rows, "tokens"), "batch": growth(rows, "batch")},
    }


def draw(rows: Sequence[SpeedRow], path: Path, column: bool = False) -> Path:
    """Write the plot of `curves` to a file, and return `path`; other arguments are those of `curves`."""
    with figure_style(column):
        return save_figure(curves(rows, column), path)


def curves(rows: Sequence[SpeedRow], column: bool = False) -> Figure:
    """Plot time against tokens, or against the batch if all rows have the same tokens; both axes are logarithmic.

    Args:
        rows: the measurements.
        column: make the figure as wide as a column of a paper, without a title.

    Raises:
        InputError: all rows have the same size and the same batch.
    """
    along = "tokens" if len({row.tokens for row in rows}) > 1 else "batch"
    if along == "batch" and len({row.case.batch for row in rows}) < 2:
        raise InputError(NO_CURVE)
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        name = f"{row.line} batch={row.case.batch}" if along == "tokens" else row.line
        x = row.tokens if along == "tokens" else row.case.batch
        lines.setdefault(name, []).append((x, row.milliseconds))
    figure = Figure(figsize=(3.4, 2.6) if column else (6.8, 4.4), layout="constrained")
    axes = figure.subplots()
    for index, (name, points) in enumerate(lines.items()):
        xs, ys = zip(*sorted(points), strict=True)
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        axes.plot(xs, ys, color=colour, marker=marker, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({x for points in lines.values() for x, _ in points}))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("tokens of an image" if along == "tokens" else "images in a batch")
    axes.set_ylabel("ms per call")
    if not column:
        axes.set_title("Time of a call")
    axes.legend(fontsize="small")
    return figure
