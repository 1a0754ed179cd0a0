"""A base small enough for tests, and inputs for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokdyn import DiT


def small_base(patch: int = 4, **settings: Any) -> DiT:
    """Build a DiT whose weights are random and nowhere zero, so that every part of it affects the output."""
    torch.manual_seed(0)
    shape = {"sample_size": 16, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    model = DiT(**{**shape, "patch_size": patch, **settings})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, timesteps and classes."""
    torch.manual_seed(1)
    return torch.randn(batch, 3, 16, 16), torch.tensor([900, 500, 3])[:batch], torch.arange(batch)
