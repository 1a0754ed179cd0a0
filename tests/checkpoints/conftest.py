"""Small models whose weights are all random, so that a misplaced tensor changes the output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tokdyn.models import DCDiT, DiT

SMALL = {"hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 5, "sample_size": 8}


def shaken(model: DiT | DCDiT) -> DiT | DCDiT:
    """Add noise to every trainable parameter."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.fixture
def dit() -> Callable[..., DiT]:
    """Return a function that builds a small DiT."""
    return lambda **settings: shaken(DiT(**{**SMALL, "patch_size": 2, **settings}))  # type: ignore[return-value]


@pytest.fixture
def dcdit() -> Callable[..., DCDiT]:
    """Return a function that builds a small DC-DiT which keeps the first and last cell, like the official ones."""
    return lambda **settings: shaken(DCDiT(**{**SMALL, "force_ends": True, **settings}))  # type: ignore[return-value]


@pytest.fixture
def same() -> Callable[..., bool]:
    """Return a function that tells whether two models have equal tensors and bit-equal outputs."""

    def compare(one: Any, other: Any, channels: int = 4, size: tuple[int, int] = (8, 8)) -> bool:
        first, second = one.state_dict(), other.state_dict()
        if set(first) != set(second) or not all(torch.equal(first[name], second[name]) for name in first):
            return False
        x = torch.randn(2, channels, *size)
        timestep, labels = torch.tensor([3, 700]), torch.tensor([0, one.config["num_classes"]])
        with torch.no_grad():
            outputs: list[Tensor] = [m(x, timestep=timestep, class_labels=labels).sample for m in (one, other)]
        return torch.equal(*outputs)

    return compare
