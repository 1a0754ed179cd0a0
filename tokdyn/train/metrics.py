"""Average the training metrics between two log lines, and store the averages as lines of JSON in metrics.jsonl.

Sums are kept on the device, so that a training step need not wait for it; only a log line does.
"""

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
"""One line of metrics.jsonl: values by name, with the step under "step"."""


class Window:
    """Running sums of each metric over the steps since the last log line, as fp32 tensors on the device.

    Args:
        device: The device that the sums stay on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._first_nonfinite = torch.full((), -1.0, device=device)
        self.steps = 0

    def add(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Add the metrics of one step to the sums, without waiting for the device.

        If a metric is NaN or infinite, the step is remembered, unless an earlier one is.

        Args:
            step: Optimizer steps taken, this one included.
            metrics: Scalars by name.
        """
        self.steps += 1
        for name, value in metrics.items():
            scalar = torch.as_tensor(value, dtype=torch.float32, device=self._device)
            self._sums[name] = self._sums.get(name, torch.zeros_like(scalar)) + scalar
            bad = ~torch.isfinite(scalar) & (self._first_nonfinite < 0)
            self._first_nonfinite = torch.where(bad, float(step), self._first_nonfinite)

    def means(self, accelerator: Accelerator) -> Row:
        """Return the mean of each metric over the steps and all processes, without resetting the sums.

        Waits for the device, and every process has to call it. A step without a metric counts as 0 in its mean.
        """
        if not self._sums:
            return {}
        stacked: Tensor = accelerator.reduce(torch.stack(list(self._sums.values())), "mean")
        return dict(zip(self._sums, (stacked / self.steps).tolist(), strict=True))

    def first_nonfinite(self, accelerator: Accelerator) -> int | None:
        """Return the first step, on any process, that had a NaN or infinite metric; None if there is none.

        All steps since this object was made count: `clear` does not forget them, and checkpoints do not hold them.
        Waits for the device, and every process has to call it.
        """
        steps = [int(step) for step in accelerator.gather(self._first_nonfinite.reshape(1)).tolist() if step >= 0]
        return min(steps, default=None)

    def clear(self) -> None:
        """Reset the sums, after a log line."""
        self._sums = {}
        self.steps = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums and the number of steps as tensors, for a checkpoint."""
        return {"steps": torch.tensor(self.steps), **{f"sum/{name}": value for name, value in self._sums.items()}}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the sums and the number of steps from what `tensors` returned."""
        self.steps = int(tensors["steps"])
        self._sums = {
            name.removeprefix("sum/"): value.to(self._device)
            for name, value in tensors.items()
            if name.startswith("sum/")
        }


def append(path: Path, row: Row) -> None:
    """Append a row to a metrics file as one line of JSON.

    Raises:
        CheckpointError: The system refused to write.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({error.strerror or error}); free some space, then continue with --resume."
        ) from error


def read(path: Path) -> list[Row]:
    """Return the rows of a metrics file, without lines that a crash left incomplete; [] if there is no file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def remove_after(path: Path, step: int) -> None:
    """Remove the rows of steps after `step` from a metrics file: a run that resumes there writes them again."""
    if path.is_file():
        rows = [row for row in read(path) if row["step"] <= step]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
