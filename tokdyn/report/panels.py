"""Draw images in rows and columns with their names and costs, and curves of training, as figures for papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from tokdyn.report.gallery import Column
from tokdyn.report.style import COLOURS, DASHES, INK, figure_style, in_lines, save_figure, with_drawable_letters

_COLUMN, _PAGE = 3.4, 6.9  # inches: a column and the whole width of a paper
_NARROWEST = 0.69  # inches of an image with its costs above
_NAMES = 0.62  # inches for the names of the rows
_LETTER = 0.058  # inches of a letter of 6.5 points


def draw_side_by_side(columns: Sequence[Column], names: Sequence[str], path: Path) -> Path:
    """Draw the same images under several settings beside each other, with what each costs above.

    Args:
        columns: the settings; those that do not fit into the width of a page are left out, the last first.
        names: names of the rows.
        path: path of the file to write.

    Returns:
        `path`.
    """
    columns = columns[: int((_PAGE - _NAMES) / _NARROWEST)]
    width = _COLUMN if _NAMES + _NARROWEST * len(columns) <= _COLUMN else _PAGE
    side = min(1.1, (width - _NAMES) / len(columns))
    tall = max(image.shape[0] / image.shape[1] for column in columns for image in column.images)
    lines = 1 + max(len(column.lines) for column in columns)
    with figure_style(column=True):
        size = (_NAMES + side * len(columns), side * tall * len(names) + 0.13 * lines + 0.1)
        engine = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
        figure = Figure(figsize=size, layout=engine)
        axes = figure.subplots(len(names), len(columns), squeeze=False)
        for place, column in enumerate(columns):
            head = "\n".join([_fitting(column.name, side), *column.lines])
            axes[0, place].set_title(head, fontsize=6.5, fontweight="normal", loc="center", color=INK)
            for row in range(len(names)):
                axes[row, place].imshow(column.images[row])
                _bare(axes[row, place])
        for row, name in enumerate(names):
            title = in_lines(name, int(_NAMES / _LETTER), side * tall, 6.5)
            axes[row, 0].set_ylabel(title, fontsize=6.5, rotation=0, ha="right", va="center", color=INK)
        return save_figure(figure, path)


def draw_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    label: str,
    path: Path,
    x_label: str = "training step",
) -> Path:
    """Draw one line for each run.

    Args:
        curves: positions and values by the name of the run.
        label: label of the vertical axis.
        path: path of the file to write.
        x_label: label of the horizontal axis.

    Returns:
        `path`.
    """
    with figure_style(column=True):
        figure = Figure(figsize=(_COLUMN, 2.2), layout="constrained")
        axes = figure.subplots()
        for place, (name, (x, y)) in enumerate(curves.items()):
            dash = DASHES[place // len(COLOURS) % len(DASHES)]
            axes.plot(x, y, color=COLOURS[place % len(COLOURS)], linestyle=dash, label=with_drawable_letters(name))
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        axes.locator_params(nbins=5)
        if len(curves) > 1:
            figure.legend(loc="outside lower left", fontsize="small")
        return save_figure(figure, path)


def draw_bars(rows: Mapping[str, Mapping[str, float]], label: str, path: Path) -> Path:
    """Draw one bar for each row, divided into parts, with a legend below.

    Args:
        rows: the values of the parts by name, for each row by its name.
        label: label of the horizontal axis, with the unit.
        path: path of the file to write.

    Returns:
        `path`.
    """
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    with figure_style(column=True):
        figure = Figure(figsize=(_COLUMN, 1.15 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        left = [0.0] * len(rows)
        for place, name in enumerate(names):
            widths = [parts.get(name, 0.0) for parts in rows.values()]
            hatch = "//" if place >= len(COLOURS) else None
            axes.barh(
                range(len(rows)), widths, left=left, color=COLOURS[place % len(COLOURS)], hatch=hatch, label=name,
                edgecolor="white",
            )  # fmt: skip
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(rows)), [_fitting(name, 1.0) for name in rows])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.locator_params(axis="x", nbins=5)
        axes.set_xlabel(label)
        figure.legend(loc="outside lower left", ncols=3, fontsize="small")
        return save_figure(figure, path)


def _fitting(name: str, inches: float) -> str:
    """Return a name, shortened with an ellipsis if it is longer than so many inches at 6.5 points."""
    letters = max(5, int(inches / _LETTER))
    return with_drawable_letters(name if len(name) <= letters else f"{name[: letters - 1]}…")


def _bare(axes: Axes) -> None:
    """Remove ticks, grid and frame of the axes."""
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
