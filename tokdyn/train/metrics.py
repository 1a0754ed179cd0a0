"""Means between two log lines, without waiting for the device, and the file they end up in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tokdyn.errors import CheckpointError
from tokdyn.train.state import write_text

Row = dict[str, Any]


class Window:
    """Sums of step metrics since the last log line, kept on the device.

    Args:
        device: Where the metrics are computed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._first_bad = torch.full((), -1.0, device=device)
        self.steps = 0

    def add(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Take in the metrics of one step, scalars by name, and remember the first step with one that is not finite."""
        self.steps += 1
        for name, value in metrics.items():
            scalar = torch.as_tensor(value, dtype=torch.float32, device=self._device)
            self._sums[name] = self._sums.get(name, torch.zeros_like(scalar)) + scalar
            bad = ~torch.isfinite(scalar) & (self._first_bad < 0)
            self._first_bad = torch.where(bad, float(step), self._first_bad)

    def means(self, accelerator: Accelerator) -> Row:
        """Return the mean of each metric over the steps and over all devices; waits for the device."""
        if not self._sums:
            return {}
        stacked: Tensor = accelerator.reduce(torch.stack(list(self._sums.values())), "mean")
        return dict(zip(self._sums, (stacked / self.steps).tolist(), strict=True))

    def first_bad(self, accelerator: Accelerator) -> int | None:
        """Return the first step since the run started with a metric that is not finite; waits for the device."""
        found = [int(step) for step in accelerator.gather(self._first_bad.reshape(1)).tolist() if step >= 0]
        return min(found, default=None)

    def clear(self) -> None:
        """Start the next window."""
        self._sums = {}
        self.steps = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors, for a checkpoint."""
        return {"steps": torch.tensor(self.steps), **{f"sum/{name}": value for name, value in self._sums.items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned."""
        self.steps = int(tensors["steps"])
        self._sums = {
            name.removeprefix("sum/"): value.to(self._device)
            for name, value in tensors.items()
            if name.startswith("sum/")
        }


def append(path: Path, row: Row) -> None:
    """Add one line of JSON to the metrics file."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error.strerror or error}).") from error


def read(path: Path) -> list[Row]:
    """Read the metrics file; a last line that was cut off by a crash is passed over."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def truncate(path: Path, step: int) -> None:
    """Drop the rows after a step, which a resumed run will write again."""
    if path.is_file():
        rows = [row for row in read(path) if row["step"] <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
