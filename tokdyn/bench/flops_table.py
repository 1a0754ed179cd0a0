"""Show the costs of models as a table, as CSV and as a bar chart."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from tokdyn.bench.flops import FlopsRow
from tokdyn.files import replacing
from tokdyn.report.style import COLOURS, figure_style, save_figure

GROUPS = {
    "embed": ("embed",),
    "scaffold": ("encoder", "decoder", "residual"),
    "router": ("router",),
    "adaLN": ("adaLN",),
    "projections": ("projections",),
    "attention": ("attention", "cross-attention"),
    "mlp": ("mlp",),
    "de-chunk": ("dechunk",),
    "head": ("head",),
}
"""Groups of parts whose FLOPs the table and the chart show as a sum."""


def grouped(parts: dict[str, float]) -> dict[str, float]:
    """Sum the parts of each group in `GROUPS`, and all other parts as "other". Sums of 0 are left out."""
    sums = {name: sum(parts.get(part, 0.0) for part in members) for name, members in GROUPS.items()}
    other = sum(parts.values()) - sum(sums.values())
    return {name: value for name, value in {**sums, "other": other}.items() if abs(value) > 1e-9}


def columns(rows: Sequence[FlopsRow]) -> dict[str, list[str]]:
    """Return the columns of the table by title, each with one text per row. Empty columns are left out."""
    names = [name for name in (*GROUPS, "other") if any(name in grouped(row.parts) for row in rows)]
    table = {
        "model": [row.model for row in rows],
        "params, M": [f"{row.params / 1e6:.1f}" for row in rows],
        "tokens": [str(row.tokens) for row in rows],
        "kept": ["-" if row.kept is None else f"{row.kept:.1%}" for row in rows],
        "kept from": [row.tokens_from for row in rows],
        "GFLOPs/image": [f"{1e3 * row.tflops_per_image:,.1f}" for row in rows],
        "GFLOPs/call": [f"{row.gflops_per_forward:.3f}" for row in rows],
        **{name: [f"{grouped(row.parts).get(name, 0.0):.3f}" for row in rows] for name in names},
        "counted": ["-" if row.counted_gflops is None else _agreement(row) for row in rows],
        "matched steps": ["-" if row.matched_steps is None else f"{row.matched_steps:,}" for row in rows],
    }
    return {name: texts for name, texts in table.items() if any(text != "-" for text in texts)}


def _agreement(row: FlopsRow) -> str:
    """Return the computed FLOPs in percent of the counted ones."""
    assert row.counted_gflops is not None
    assert row.computed_gflops is not None
    return f"{row.computed_gflops / row.counted_gflops:.2%}"


def write_csv(rows: Sequence[FlopsRow], path: Path) -> Path:
    """Write a CSV file with one line per model and a column for each part; return `path`."""
    parts = list(dict.fromkeys(name for row in rows for name in row.parts))
    fields = [name for name in FlopsRow.__dataclass_fields__ if name != "parts"]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*fields, *(f"gflops_{name}" for name in parts)])
        for row in rows:
            values: list[Any] = [getattr(row, name) for name in fields]
            writer.writerow([*values, *(row.parts.get(name, 0.0) for name in parts)])
    return path


def draw_parts(rows: Sequence[FlopsRow], path: Path) -> Path:
    """Draw a bar chart with one bar per model, divided into groups of parts; return `path`."""
    with figure_style():
        figure = Figure(figsize=(8.0, 1.2 + 0.42 * len(rows)), layout="constrained")
        axes = figure.subplots()
        shares = [grouped(row.parts) for row in rows]
        names = [name for name in (*GROUPS, "other") if any(name in share for share in shares)]
        left = [0.0] * len(rows)
        for index, name in enumerate(names):
            widths = [share.get(name, 0.0) for share in shares]
            colour, hatch = COLOURS[index % len(COLOURS)], "//" if index >= len(COLOURS) else None
            axes.barh(range(len(rows)), widths, left=left, color=colour, hatch=hatch, label=name, edgecolor="white")
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(rows)), [row.model for row in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("GFLOPs per call (a multiply-add is 2)")
        axes.set_title("Where the FLOPs go")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8.5)
        return save_figure(figure, path)
