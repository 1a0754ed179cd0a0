"""Average metrics between two log lines without waiting for the device, and keep them in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from tokdyn.errors import CheckpointError
from tokdyn.train.checkpoints import write_text

Row = dict[str, Any]


class Window:
    """Sums of the metrics of every step since the last log line, kept on the device.

    Args:
        device: The device that computes the metrics.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._first_nonfinite = torch.full((), -1.0, device=device)
        self.steps = 0

    def add(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Add the metrics of a step, scalars by name, and remember the first step with one that is not finite."""
        self.steps += 1
        for name, value in metrics.items():
            scalar = torch.as_tensor(value, dtype=torch.float32, device=self._device)
            self._sums[name] = self._sums.get(name, torch.zeros_like(scalar)) + scalar
            bad = ~torch.isfinite(scalar) & (self._first_nonfinite < 0)
            self._first_nonfinite = torch.where(bad, float(step), self._first_nonfinite)

    def means(self, accelerator: Accelerator) -> Row:
        """Return the mean of every metric over the steps and all devices. Waits for the device."""
        if not self._sums:
            return {}
        stacked: Tensor = accelerator.reduce(torch.stack(list(self._sums.values())), "mean")
        return dict(zip(self._sums, (stacked / self.steps).tolist(), strict=True))

    def first_nonfinite(self, accelerator: Accelerator) -> int | None:
        """Return the first step of this call of `train` with a metric that is not finite. Waits for the device."""
        steps = [int(step) for step in accelerator.gather(self._first_nonfinite.reshape(1)).tolist() if step >= 0]
        return min(steps, default=None)

    def clear(self) -> None:
        """Start the next window."""
        self._sums = {}
        self.steps = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as tensors, for a checkpoint."""
        return {"steps": torch.tensor(self.steps), **{f"sum/{name}": value for name, value in self._sums.items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the state that `tensors` returned."""
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
        raise CheckpointError(
            f"{path} could not be written ({error.strerror or error}); free some space, then continue with --resume."
        ) from error


def read(path: Path) -> list[Row]:
    """Read the metrics file, skipping a last line that a crash has truncated."""
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
    """Remove the rows after a step, which a resumed run will write again."""
    if path.is_file():
        rows = [row for row in read(path) if row["step"] <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
