"""What is cheap on which device."""

from __future__ import annotations

from torch import Tensor


def asking_waits(x: Tensor) -> bool:
    """Whether reading a value of this tensor makes the host wait for a queue of work, as on every accelerator."""
    return x.device.type != "cpu"
