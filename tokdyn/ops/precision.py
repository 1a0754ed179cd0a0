"""The one rule of precision for what must not be computed in half precision."""

from __future__ import annotations

import torch
from torch import Tensor


def exact(x: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is already."""
    return x if x.dtype == torch.float64 else x.float()
