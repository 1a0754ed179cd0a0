"""Draw the figures of a report as files for papers (`tokdyn plot`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tokdyn.files import require_folder
from tokdyn.report.gallery import Column
from tokdyn.report.maps import draw_maps
from tokdyn.report.panels import draw_bars, draw_curves, draw_side_by_side
from tokdyn.report.pareto import ParetoPoint, draw_pareto
from tokdyn.report.trajectory import draw_trajectory
from tokdyn.run_report.build import CURVES, Run, cost_lines, gather
from tokdyn.run_report.folders import curve, quality_points
from tokdyn.run_report.settings import PlotConfig

_ROWS = 4  # images in the figure of budgets


def plot(config: PlotConfig, paths: Sequence[str]) -> tuple[Path, ...]:
    """Sample the runs, and draw each figure in each format.

    Args:
        config: the settings.
        paths: as for `tokdyn.run_report.build.report`.

    Returns:
        The paths of the files: budgets, parts, training curves and Pareto plots of all runs together, keep maps and
        trajectories of each run.

    Raises:
        TokdynError: as in `gather`, or a file cannot be written.
    """
    require_folder(config.out)
    runs = gather(config, paths)
    files: list[Path] = []

    def draw(name: str, drawer: Callable[[Path], Path]) -> None:
        files.extend(drawer(config.out / f"{name}.{kind}") for kind in config.formats)

    sampled = {run.name: run.sampled for run in runs if run.sampled is not None}
    if sampled:
        flops = {name: {part.name: part.gflops for part in each.parts if part.gflops} for name, each in sampled.items()}
        times = {name: {part.name: part.milliseconds for part in each.parts} for name, each in sampled.items()}
        draw("flops-by-part", lambda path: draw_bars(flops, "GFLOPs per step and image", path))
        draw("time-by-part", lambda path: draw_bars(times, "ms per step and image", path))
    for number, (name, each) in enumerate(sampled.items(), 1):
        label = "" if len(sampled) == 1 else f"-{number}-{_file_name(name)}"
        columns = [Column(budget.name, cost_lines(budget), list(budget.images[:_ROWS])) for budget in each.budgets]
        draw(f"budgets{label}", lambda path, c=columns, n=each.names: draw_side_by_side(c, n[:_ROWS], path))  # type: ignore[misc]
        trajectories = [budget.trajectory for budget in each.budgets]
        draw(f"trajectory{label}", lambda path, t=trajectories: draw_trajectory(t, path, column=True))  # type: ignore[misc]
        if each.maps is not None:
            finals = each.budgets[0].images[: config.map_images]
            draw(
                f"maps{label}",
                lambda path, e=each, f=finals: draw_maps(  # type: ignore[misc]
                    e.maps, f, e.job.decoder, path, e.names[: len(f)], column=True
                ),
            )
    _compare(runs, draw)
    return tuple(files)


def _compare(runs: Sequence[Run], draw: Callable[[str, Callable[[Path], Path]], None]) -> None:
    """Draw what compares runs: training curves, and quality against cost."""
    for metric, label in CURVES.items():
        curves = {run.name: curve(run.folder.metrics, metric) for run in runs}
        curves = {name: line for name, line in curves.items() if len(line[0]) > 1}
        if curves:
            draw(f"training-{metric}", lambda path, c=curves, text=label: draw_curves(c, text, path))  # type: ignore[misc]
    similar = [
        ParetoPoint(series=run.name, label=f"{budget.tail_drop:g}", cost=budget.gflops, quality=budget.psnr)
        for run in runs
        if run.sampled is not None
        for budget in run.sampled.budgets[1:]
        if budget.gflops is not None and budget.psnr is not None
    ]
    if similar:
        name = "PSNR to the largest budget, dB"
        draw(
            "similarity",
            lambda path: draw_pareto(similar, path, "GFLOPs per image", name, higher_is_better=True, column=True),
        )
    found: dict[str, list[ParetoPoint]] = {}
    for run in runs:
        name, points = quality_points(run.folder)
        found.setdefault(name, []).extend(points)
    for name, points in found.items():
        if points:
            draw(
                f"pareto-{_file_name(name)}",
                lambda path, p=points, n=name: draw_pareto(p, path, "GFLOPs per image", n, joined=False, column=True),  # type: ignore[misc]
            )


def _file_name(text: str) -> str:
    """Return a text as part of a file name: letters, digits and hyphens."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:60] or "run"
