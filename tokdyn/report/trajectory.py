"""Draw the kept tokens and the time of each step against the noise level, for one or several tail drops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter
from numpy.typing import NDArray

from tokdyn.diffusion.records import StepRecord
from tokdyn.errors import InputError
from tokdyn.report.style import COLOURS, DASHES, MUTED, figure_style, save_figure

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trajectory:
    """The cost of the S steps of n images that were sampled with one tail drop.

    Attributes:
        label: name in the legend.
        level: (S,) noise level in [0, 1].
        cond: (S, n) kept share in the conditional branch; None for a model that computes every token.
        uncond: (S, n) kept share in the unconditional branch, NaN in steps that did not compute it; None if no step
            did.
        milliseconds: (S,) time of the step per image.
    """

    label: str
    level: Floats
    cond: Floats | None
    uncond: Floats | None
    milliseconds: Floats


def join_batches(label: str, batches: Sequence[Sequence[StepRecord]], images: int) -> Trajectory:
    """Join the records of batches that were sampled with the same settings.

    Args:
        label: name in the legend.
        batches: the records of the steps of each batch.
        images: number of images of all batches together.

    Raises:
        InputError: there are no records.
    """
    if not batches or not batches[0]:
        raise InputError("There are no step records to draw: give at least one batch.")
    steps = list(zip(*batches, strict=True))
    level = np.array([step[0].level for step in steps])
    milliseconds = np.array([1000.0 * sum(record.seconds for record in step) / images for step in steps])
    if any(record.counts is None for record in steps[0]):
        return Trajectory(label, level, None, None, milliseconds)
    cond, uncond = np.full((2, len(steps), images), np.nan)
    for row, step in enumerate(steps):
        counts = [record.counts for record in step if record.counts is not None]
        cond[row] = np.concatenate([count.cond.numpy() / count.tokens for count in counts])
        second = [count.uncond.numpy() / count.tokens for count in counts if count.uncond is not None]
        if second:
            uncond[row] = np.concatenate(second)
    return Trajectory(label, level, cond, None if np.isnan(uncond).all() else uncond, milliseconds)


def draw_trajectory(
    trajectories: Sequence[Trajectory], path: Path, title: str = "What each step costs", column: bool = False
) -> Path:
    """Draw the kept share (above) and the time of each step (below), from noise on the left to the image on the right.

    Lines are means over images; bands reach from the 10th to the 90th percentile. Each trajectory has its colour; the
    conditional branch is solid, the unconditional one dashed.

    Args:
        trajectories: the trajectories to compare.
        path: path of the file to write.
        title: title of the figure.
        column: make the figure as wide as a column of a paper, without a title.

    Returns:
        `path`.

    Raises:
        InputError: there are no trajectories.
    """
    if not trajectories:
        raise InputError("There are no trajectories to draw: give at least one.")
    routed = any(trajectory.cond is not None for trajectory in trajectories)
    width, height = (3.4, 3.1 if routed else 1.9) if column else (6.4, 5.4 if routed else 3.1)
    with figure_style(column):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(1 + routed, 1, sharex=True, squeeze=False, height_ratios=[1.5, 1] if routed else [1])
        if routed:
            _draw_kept(axes[0, 0], trajectories)
        _draw_time(axes[-1, 0], trajectories)
        axes[-1, 0].set_xlabel("noise level  (1 is pure noise, 0 the clean image)")
        axes[-1, 0].set_xlim(1.02, -0.02)
        if not column:
            axes[0, 0].set_title(title)
        return save_figure(figure, path)


def _draw_kept(axes: Axes, trajectories: Sequence[Trajectory]) -> None:
    """Draw the kept shares of all trajectories that have them, with a legend."""
    colours = _colours(len(trajectories))
    for trajectory, colour in zip(trajectories, colours, strict=True):
        for share, dash in ((trajectory.cond, DASHES[0]), (trajectory.uncond, DASHES[1])):
            if share is None:
                continue
            computed = ~np.isnan(share).any(axis=1)
            level, share = trajectory.level[computed], share[computed]
            low, high = np.quantile(share, [0.1, 0.9], axis=1)
            axes.fill_between(level, low, high, color=colour, alpha=0.14, linewidth=0)
            axes.plot(level, share.mean(axis=1), color=colour, linestyle=dash)
    axes.set_ylabel("tokens kept")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(0, None)
    handles = [
        Line2D([], [], color=c, label=trajectory.label) for trajectory, c in zip(trajectories, colours, strict=True)
    ]
    if len(trajectories) == 1:
        handles = []
    if any(trajectory.uncond is not None for trajectory in trajectories):
        colour = MUTED if len(trajectories) > 1 else COLOURS[0]
        names = ("with class", "without class")
        handles += [Line2D([], [], color=colour, ls=d, label=n) for d, n in zip(DASHES, names, strict=False)]
    if handles:
        axes.legend(handles=handles, loc="best", fontsize="small")


def _draw_time(axes: Axes, trajectories: Sequence[Trajectory]) -> None:
    """Draw the time of each step of all trajectories; times far above the others are cut off."""
    for trajectory, colour in zip(trajectories, _colours(len(trajectories)), strict=True):
        axes.plot(trajectory.level, trajectory.milliseconds, color=colour, label=trajectory.label)
    axes.set_ylabel("time per step\nand image [ms]")
    slowest = max(
        float(np.quantile(trajectory.milliseconds, 0.98)) for trajectory in trajectories
    )  # the first step warms up
    axes.set_ylim(0, 1.15 * slowest)
    if len(trajectories) > 1 and all(trajectory.cond is None for trajectory in trajectories):
        axes.legend(loc="best", fontsize="small")


def _colours(count: int) -> list[str]:
    """Return a colour for each of `count` trajectories."""
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
