"""What is cheap on which device."""

from __future__ import annotations

import torch
from torch import Tensor


def asking_waits(x: Tensor) -> bool:
    """Whether reading a value of this tensor makes the host wait for a queue of work, as on every accelerator.

    While a graph is being compiled there are no values to read, which comes to the same.
    """
    return x.device.type != "cpu" or torch.compiler.is_compiling()
