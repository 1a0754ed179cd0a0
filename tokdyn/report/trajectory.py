"""Kept tokens and time against the noise level, for one or several budgets."""

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
    """What every step of a sampling run cost, at one budget. S steps of n images.

    Attributes:
        label: name of the budget.
        level: (S,) noise level in [0, 1].
        cond: (S, n) share of the tokens kept in the conditional branch; None for a model that computes every token.
        uncond: (S, n) share kept in the unconditional branch, NaN where it was not computed; None if it never was.
        milliseconds: (S,) time of the step per image.
    """

    label: str
    level: Floats
    cond: Floats | None
    uncond: Floats | None
    milliseconds: Floats


def trajectory(label: str, batches: Sequence[Sequence[StepRecord]], images: int) -> Trajectory:
    """Join the records of all batches of a run.

    Args:
        label: name of the budget.
        batches: for each batch, its steps.
        images: how many images the batches hold together.
    """
    if not batches or not batches[0]:
        raise InputError("there are no step records to draw.")
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


def draw_trajectory(runs: Sequence[Trajectory], path: Path, title: str = "What each step costs") -> Path:
    """Draw kept tokens above and time below, noise on the left and the finished image on the right.

    Lines are means over images, bands reach from the 10th to the 90th percentile. Colour is the budget; the conditional
    branch is solid, the unconditional one dashed.
    """
    if not runs:
        raise InputError("there are no trajectories to draw.")
    routed = any(run.cond is not None for run in runs)
    with figure_style():
        figure = Figure(figsize=(6.4, 5.4 if routed else 3.1), layout="constrained")
        axes = figure.subplots(1 + routed, 1, sharex=True, squeeze=False, height_ratios=[1.5, 1] if routed else [1])
        if routed:
            _kept(axes[0, 0], runs)
        _time(axes[-1, 0], runs)
        axes[-1, 0].set_xlabel("noise level  (1 is pure noise, 0 the clean image)")
        axes[-1, 0].set_xlim(1.02, -0.02)
        axes[0, 0].set_title(title)
        return save_figure(figure, path)


def _kept(axes: Axes, runs: Sequence[Trajectory]) -> None:
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        for share, dash in ((run.cond, DASHES[0]), (run.uncond, DASHES[1])):
            if share is None:
                continue
            there = ~np.isnan(share).any(axis=1)
            level, share = run.level[there], share[there]
            low, high = np.quantile(share, [0.1, 0.9], axis=1)
            axes.fill_between(level, low, high, color=colour, alpha=0.14, linewidth=0)
            axes.plot(level, share.mean(axis=1), color=colour, linestyle=dash)
    axes.set_ylabel("tokens kept")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylim(0, None)
    handles = [Line2D([], [], color=c, label=run.label) for run, c in zip(runs, _colours(len(runs)), strict=True)]
    if len(runs) == 1:
        handles = []
    if any(run.uncond is not None for run in runs):
        colour = MUTED if len(runs) > 1 else COLOURS[0]
        names = ("with class", "without class")
        handles += [Line2D([], [], color=colour, ls=d, label=n) for d, n in zip(DASHES, names, strict=False)]
    if handles:
        axes.legend(handles=handles, loc="best", fontsize=8.5)


def _time(axes: Axes, runs: Sequence[Trajectory]) -> None:
    for run, colour in zip(runs, _colours(len(runs)), strict=True):
        axes.plot(run.level, run.milliseconds, color=colour, label=run.label)
    axes.set_ylabel("time per step\nand image [ms]")
    axes.set_ylim(0, 1.15 * max(float(np.quantile(run.milliseconds, 0.98)) for run in runs))  # the first step warms up
    if len(runs) > 1 and all(run.cond is None for run in runs):
        axes.legend(loc="best", fontsize=8.5)


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]
