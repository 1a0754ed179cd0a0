"""Draw a calibration: which blocks matter when, and how the output of the blocks follows the indicator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from tokdyn.calibration.caching import CacheCalibration
from tokdyn.calibration.magnitudes import Ratios
from tokdyn.calibration.skipping import SkipCalibration
from tokdyn.calibration.threshold import simulate
from tokdyn.ops.caching import rescale
from tokdyn.report.style import COLOURS, INK, MUTED, figure_style, save_figure

_MOST_LABELS = 24  # rows or columns that have room for a label each
_SHADES = LinearSegmentedColormap.from_list("influence", ["#f4f8fb", "#9cc4de", COLOURS[0], "#00263d"])
_LEVELS = LinearSegmentedColormap.from_list("noise level", ["#a9d3ea", COLOURS[0], "#001a2b"])


def draw_skipping(found: SkipCalibration, path: Path, title: str) -> Path:
    """Draw a heat map of the influence of every block at every noise level, with skipped cells crossed out."""
    influence = found.measured.influence.numpy()
    levels, blocks = influence.shape
    low = max(float(influence[influence > 0].min(initial=1.0)), 1e-6)
    high = max(float(influence.max()), 2 * low)
    with figure_style():
        size = (min(14.0, max(6.4, 2.6 + 0.36 * blocks)), min(9.0, max(3.4, 2.0 + 0.34 * levels)))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        axes.grid(False)
        shown = axes.imshow(
            np.clip(influence[::-1], low, None), cmap=_SHADES, norm=LogNorm(low, high), aspect="auto", origin="upper"
        )
        for row, skipped in enumerate(found.skips):
            for block in skipped:
                _cross(axes, block, levels - 1 - row)
        rows = found.measured.bins.rows()[::-1]
        step = -(-levels // _MOST_LABELS)
        axes.set_yticks(range(0, levels, step), [f"{a:.2f} to {b:.2f}" for a, b in rows[::step]], fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(min(blocks, _MOST_LABELS), integer=True))
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel("block")
        axes.set_ylabel("noise level  (1 is pure noise)")
        axes.set_title(title)
        bar = figure.colorbar(shown, ax=axes, pad=0.015, aspect=30, format=FuncFormatter(_digits))
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=8, length=2)
        bar.set_label("influence", fontsize=8.5)
        bar.outline.set_visible(False)
        figure.supxlabel(_skipping_caption(found), x=0.01, ha="left", fontsize=8, color=MUTED)
        return save_figure(figure, path)


def _digits(value: float, place: int | None = None) -> str:
    """Format a number without an exponent."""
    return f"{value:.6f}".rstrip("0").rstrip(".")


def _cross(axes: Axes, column: float, row: float) -> None:
    """Mark a cell as skipped."""
    cell = Rectangle((column - 0.5, row - 0.5), 1, 1, facecolor="white", edgecolor="none", alpha=0.55)
    axes.add_patch(cell)
    axes.plot([column - 0.26, column + 0.26], [row - 0.26, row + 0.26], color=COLOURS[1], linewidth=1.6)
    axes.plot([column - 0.26, column + 0.26], [row + 0.26, row - 0.26], color=COLOURS[1], linewidth=1.6)


def _skipping_caption(found: SkipCalibration) -> str:
    skipped = sum(len(row) for row in found.skips)
    cells = found.measured.influence.numel()
    text = (
        "Influence: 1 - mean cosine between the input and the output of a block.\n"
        f"Crossed out: {skipped} of {cells} cells are skipped; {found.flops:.1%} of the FLOPs remain."
    )
    if found.error is None:
        return text
    worst = max(range(len(found.error)), key=found.error.__getitem__)
    low, high = found.measured.bins.rows()[worst]
    return (
        f"{text}\nThe largest relative error of the output is {found.error[worst]:.3f}, at levels {low:.2f} to "
        f"{high:.2f}."
    )


def draw_caching(found: CacheCalibration, path: Path, title: str) -> Path:
    """Draw measured changes with the fitted polynomial, or MagCache's ratios, and the steps that are reused."""
    with figure_style():
        figure = Figure(figsize=(10.4, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
        if found.ratios is None:
            _scatter(figure, left, found)
        else:
            _ratios(left, found.ratios)
        _timeline(right, found)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
        caption = f"The blocks run in {found.computed:.1%} of the steps; {found.flops:.1%} of the FLOPs remain."
        figure.supxlabel(caption, x=0.01, ha="left", fontsize=8, color=MUTED)
        return save_figure(figure, path)


def _scatter(figure: Figure, axes: Axes, found: CacheCalibration) -> None:
    """Plot every pair of neighbouring steps, coloured by noise level, and the polynomial."""
    changes, effects, levels = _points(found)
    dots = axes.scatter(changes, effects, c=levels, cmap=_LEVELS, vmin=0.0, vmax=1.0, s=14, linewidths=0, alpha=0.85)
    x = torch.linspace(float(changes.min()), float(changes.max()), 300, dtype=torch.float64)
    axes.plot(x.numpy(), rescale(x, found.method.coefficients).numpy(), color=COLOURS[1], linewidth=2.2)
    axes.set_xlabel("relative change of the indicator")
    axes.set_ylabel("relative change of the blocks' output")
    axes.set_title(
        f"polynomial of degree {len(found.method.coefficients) - 1}: explains {found.fit or 0.0:.0%} of the variance",
        fontsize=9.5,
    )
    axes.set_ylim(0, None)
    axes.margins(x=0.03)
    bar = figure.colorbar(dots, ax=axes, pad=0.015, aspect=30)
    bar.set_label("noise level", fontsize=8.5)
    bar.outline.set_visible(False)


def _ratios(axes: Axes, ratios: Ratios) -> None:
    """Plot the ratios of every guidance branch against the step."""
    for place, (name, values) in enumerate(ratios.branches.items()):
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(range(len(values)), values, color=colour, marker="o", markersize=3, label=f"branch {name}")
    axes.set_xlabel("step")
    axes.set_ylabel("length of the effect over that in the step before")
    axes.set_title(f"they differ by at most {ratios.deviation:.2g} (standard deviation) over images", fontsize=9.5)
    axes.legend(frameon=False, fontsize=8)


def _timeline(axes: Axes, found: CacheCalibration) -> None:
    """Mark the steps in which the blocks run, for each sample and branch of the first trajectory."""
    rows: dict[tuple[object, int], list[tuple[float, bool]]] = {}
    first = found.steps[0].position.trajectory
    for step, reuse in zip(found.steps, simulate(found.steps, found.local), strict=True):
        if step.position.trajectory == first:
            for sample, reused in enumerate(reuse.tolist()):
                rows.setdefault((step.position.label, sample), []).append((step.levels[sample], reused))
    for row_number, row in enumerate(rows.values()):
        for reused, colour, size in ((False, COLOURS[0], 22), (True, "#c9d6df", 9)):
            levels = [level for level, was_reused in row if was_reused == reused]
            axes.scatter(levels, [row_number] * len(levels), s=size, color=colour, linewidths=0)
    axes.set_xlim(1.02, -0.02)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.yaxis.set_major_locator(MaxNLocator(min(len(rows), 12), integer=True))
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("noise level  (1 is pure noise, 0 the clean image)")
    axes.set_ylabel("sample of the batch")
    axes.set_title(f"threshold {found.method.threshold:.4g}: large dots are steps whose blocks run", fontsize=9.5)


def _points(found: CacheCalibration) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return changes, effects and noise levels of every sample of every step that has a step before it."""
    rows: list[Sequence[float]] = []
    for step in found.steps:
        if step.change is not None and step.effect is not None:
            rows += zip(step.change.tolist(), step.effect.tolist(), step.levels, strict=True)
    table = np.array(rows)
    table = table[np.isfinite(table).all(axis=1)]
    return table[:, 0], table[:, 1], table[:, 2]
