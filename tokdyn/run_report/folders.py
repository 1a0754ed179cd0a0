"""Read what lies in the folder of a run, or in one that a command has written: recipe, metrics and measurements."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokdyn.bases.locating import locate
from tokdyn.bases.table import rows
from tokdyn.errors import CheckpointError, DataError
from tokdyn.files import json_object, user_path
from tokdyn.limits import YAML_BYTES
from tokdyn.reading import read_bytes
from tokdyn.report.pareto import ParetoPoint
from tokdyn.train import metrics

QUALITY = "quality.json"
RESULTS = {QUALITY: "tokdyn bench quality", "calibration.json": "tokdyn calibrate", "upcycle.json": "tokdyn upcycle"}
"""Files of measurements by name, and the commands that write them."""


@dataclass(frozen=True)
class Folder:
    """The files of one folder.

    Attributes:
        path: the folder or file.
        model: what commands call the model in it: the path, or the name that `tokdyn models` lists.
        name: that name, or that of the folder.
        recipe: text of recipe.yaml; "" if there is none.
        metrics: numbers of each line of metrics.jsonl.
        results: content of the files of measurements, by file name.
    """

    path: Path
    model: str
    name: str
    recipe: str
    metrics: tuple[dict[str, float], ...]
    results: dict[str, dict[str, Any]]

    @property
    def holds_model(self) -> bool:
        """Whether there may be a model to sample: unless the folder holds measurements and no run."""
        return bool(self.recipe) or not self.results or (self.path / "config.json").is_file()


def read_folder(path: Path | str) -> Folder:
    """Read the files of a run or of a folder of measurements. Nothing is loaded and nothing is sampled.

    Args:
        path: the folder; where there is none, a name that `tokdyn models` lists as pretrained.

    Raises:
        DataError: the path does not exist, or a file in it cannot be read.
        CheckpointError: the pretrained model is not in the cache and cannot be downloaded.
    """
    place = user_path(path)
    model, name = str(place), place.absolute().name
    if not place.exists() and str(path) in rows():
        model = name = str(path)
        place, _ = locate(name)
    if not place.exists():
        raise DataError(
            f"{place} does not exist: give the folder of a run, a pretrained model "
            "(tokdyn models), or a folder of measurements."
        )
    recipe = ""
    try:
        if (place / "recipe.yaml").is_file():
            recipe = read_bytes(place / "recipe.yaml", YAML_BYTES).decode(errors="replace")
        lines = tuple(_numbers(row) for row in metrics.read(place / "metrics.jsonl") if isinstance(row, dict))
        results = {name: json_object(place / name) for name in RESULTS if (place / name).is_file()}
    except (OSError, UnicodeDecodeError, CheckpointError) as error:
        raise DataError(f"{place} holds a file that cannot be read ({error}): restore or remove it.") from error
    return Folder(place, model, name, recipe, lines, results)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the finite numbers of a line of metrics."""
    good = {
        name: value for name, value in row.items() if isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {str(name): float(value) for name, value in good.items() if math.isfinite(value)}


def curve(rows: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Return the steps and the values of one metric, where both are known."""
    points = [(row["step"], row[name]) for row in rows if "step" in row and name in row]
    return [step for step, _ in points], [value for _, value in points]


def quality_points(folder: Folder) -> tuple[str, list[ParetoPoint]]:
    """Return the measurement that ranks the stacks of `tokdyn bench quality`, and a point for each of them.

    Returns:
        The name of the measurement, "" if the folder holds none; and the points, whose cost is in GFLOPs per image.
    """
    content = folder.results.get(QUALITY, {})
    name, rows = content.get("quality"), content.get("rows")
    if not isinstance(name, str) or not isinstance(rows, list):
        return "", []
    points = []
    for row in rows:
        if not isinstance(row, dict):
            continue
        values = row.get("values")
        value = (values if isinstance(values, dict) else {}).get(name, row.get(name))
        if value is None and name == "feature_distance":
            value = 0.0  # the first stack is compared with itself
        cost = row.get("tflops_per_image")
        if isinstance(value, int | float) and isinstance(cost, int | float):
            label = f"{row.get('name')}"
            points.append(ParetoPoint(series=folder.name, label=label, cost=1e3 * cost, quality=float(value)))
    return name, points


def shown(content: Mapping[str, Any]) -> str:
    """Return measurements as indented JSON, without their long lists."""

    def shortened(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: shortened(each) for key, each in value.items()}
        if isinstance(value, list) and len(value) > 24:
            return [*map(shortened, value[:4]), f"... {len(value)} in all"]
        return [shortened(each) for each in value] if isinstance(value, list) else value

    return json.dumps(shortened(content), indent=1, ensure_ascii=False)
