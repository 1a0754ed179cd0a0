"""Average the training metrics between two log lines, and remember the losses that a spike is compared with.

Sums are kept on the device, so that a training step need not wait for it; only a log line does.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from tokdyn.errors import CheckpointError
from tokdyn.train.metrics import Row


class Window:
    """Running sums of each metric over the steps since the last log line, as fp32 tensors on the device.

    Args:
        device: The device that the sums stay on.
        limit: A loss above it counts as bad, as one that is not finite does; None sets no limit.

    Attributes:
        recent: Losses of the last steps, which `tokdyn.train.guard` compares those of the next ones with.
    """

    def __init__(self, device: torch.device, limit: float | None = None) -> None:
        self._device = device
        self._limit = float("inf") if limit is None else limit
        self._sums: dict[str, Tensor] = {}
        self._losses: list[tuple[int, Tensor]] = []
        self._first_bad = torch.full((), -1.0, device=device)
        self.recent: list[float] = []
        self.steps = 0

    def add(self, step: int, metrics: Mapping[str, Tensor | float]) -> None:
        """Add the metrics of one step to the sums, without waiting for the device.

        If a metric is NaN or infinite, or the loss exceeds the limit, the step is remembered, unless an earlier one is.

        Args:
            step: Optimizer steps taken, this one included.
            metrics: Scalars by name.
        """
        self.steps += 1
        for name, value in metrics.items():
            scalar = torch.as_tensor(value, dtype=torch.float32, device=self._device)
            self._sums[name] = self._sums.get(name, torch.zeros_like(scalar)) + scalar
            bad = ~torch.isfinite(scalar)
            if name == "loss":
                self._losses.append((step, scalar))
                bad = bad | (scalar > self._limit)
            self._first_bad = torch.where(bad & (self._first_bad < 0), float(step), self._first_bad)

    def means(self, accelerator: Accelerator) -> Row:
        """Return the mean of each metric over the steps and all processes, without resetting the sums.

        Waits for the device, and every process has to call it. A step without a metric counts as 0 in its mean.
        """
        if not self._sums:
            return {}
        stacked: Tensor = accelerator.reduce(torch.stack(list(self._sums.values())), "mean")
        return dict(zip(self._sums, (stacked / self.steps).tolist(), strict=True))

    def take_losses(self, accelerator: Accelerator) -> list[tuple[int, float]]:
        """Return step and loss, the mean over all processes, of each step since the last call.

        Waits for the device, and every process has to call it.
        """
        steps, losses = [step for step, _ in self._losses], [loss for _, loss in self._losses]
        self._losses = []
        if not losses:
            return []
        values: Tensor = accelerator.reduce(torch.stack(losses), "mean")
        return list(zip(steps, values.tolist(), strict=True))

    def first_bad(self, accelerator: Accelerator) -> int | None:
        """Return the first step, on any process, that had a bad metric; None if there is none.

        All steps since this object was made count: `clear` does not forget them, and checkpoints do not hold them.
        Waits for the device, and every process has to call it.
        """
        steps = [int(step) for step in accelerator.gather(self._first_bad.reshape(1)).tolist() if step >= 0]
        return min(steps, default=None)

    def clear(self) -> None:
        """Reset the sums, after a log line."""
        self._sums = {}
        self.steps = 0

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums, the number of steps and the recent losses as tensors, for a checkpoint."""
        sums = {f"sum/{name}": value for name, value in self._sums.items()}
        return {"steps": torch.tensor(self.steps), "recent": torch.tensor(self.recent, dtype=torch.float32), **sums}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned.

        Raises:
            CheckpointError: A tensor is missing or has another shape or type.
        """
        sums = {name.removeprefix("sum/"): value for name, value in tensors.items() if name.startswith("sum/")}
        steps, recent = tensors.get("steps"), tensors.get("recent", torch.empty(0))
        if (
            steps is None
            or (steps.shape, steps.dtype) != ((), torch.int64)
            or (recent.dim(), recent.dtype) != (1, torch.float32)
            or any((value.shape, value.dtype) != ((), torch.float32) for value in sums.values())
        ):
            raise CheckpointError("The checkpoint's sums of metrics are not numbers; use an earlier checkpoint.")
        self.steps, self.recent, self._losses = int(steps), recent.tolist(), []
        self._sums = {name: value.to(self._device) for name, value in sums.items()}
