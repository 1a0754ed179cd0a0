"""Draw the figures of docs/results whose numbers are in benchmarks/results, as wide as a column of a paper."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import upcycling
from tokdyn.bench import speed_table
from tokdyn.bench.speed import Case, SpeedRow
from tokdyn.report.pareto import ParetoPoint, draw_pareto

NUMBERS = Path(__file__).parents[2] / "benchmarks" / "results"
FOLDER = Path(__file__).parents[1] / "results"
_COST = "GFLOPs per image"


def cifar10(folder: Path) -> Path:
    """Draw distance against FLOPs of the models of the CIFAR-10 study."""
    rows = _numbers("cifar10")["rows"]
    judge = next(name for name in rows[0]["values"] if name.startswith("frechet_distance"))
    points = [
        ParetoPoint(
            series=row["model"], label=row["label"] or "", cost=row["gflops_per_image"], quality=row["values"][judge]
        )
        for row in rows
    ]
    return draw_pareto(points, folder / "cifar10-pareto.png", _COST, judge, column=True)


def stacking(folder: Path) -> Path:
    """Draw distance against FLOPs of the stacks."""
    content = _numbers("stacking")
    judge = content["quality"]
    points = [
        ParetoPoint(
            series=Path(row["model"]).parts[0],
            label=row["name"],
            cost=1e3 * row["tflops_per_image"],
            quality=row["values"][judge],
        )
        for row in content["rows"]
    ]
    return draw_pareto(points, folder / "cifar10-stacking-pareto.png", _COST, judge, joined=False, column=True)


def losses(folder: Path) -> Path:
    """Draw the losses of upcycled models."""
    path = folder / "cifar10-upcycling.png"
    upcycling.draw(_numbers("upcycling"), path)
    return path


def batches(folder: Path) -> Path:
    """Draw time against the batch."""
    return _speed("scaling-batch", folder)


def tokens(folder: Path) -> Path:
    """Draw time against tokens."""
    return _speed("scaling-tokens", folder)


def _speed(name: str, folder: Path) -> Path:
    rows = [SpeedRow(**{**row, "case": Case(**row["case"])}) for row in _numbers(f"{name}-cpu")["rows"]]
    return speed_table.draw(rows, folder / f"{name}.png", column=True)


def _numbers(name: str) -> Any:
    return json.loads((NUMBERS / f"{name}.json").read_text(encoding="utf-8"))


ALL = (cifar10, stacking, losses, batches, tokens)
