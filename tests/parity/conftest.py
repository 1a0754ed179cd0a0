"""Outputs of the official DC-DiT code, recorded in fp32 on a 16x16 grid (tests/parity/data)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tokdyn import checkpoints
from tokdyn.models import DCDiT

DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def cases() -> dict[str, Tensor]:
    """Load recorded inputs, outputs, masks and gradients by name."""
    return load_file(DATA / "dcdit_official_16x16.cases.safetensors")


@pytest.fixture(scope="session")
def facts() -> dict[str, Any]:
    """Load the recorded configuration, counts, losses and FLOPs."""
    content: dict[str, Any] = json.loads((DATA / "dcdit_official_16x16.json").read_text())
    return content


@pytest.fixture(scope="session")
def weights() -> Path:
    """Return the file of the official weights."""
    return DATA / "dcdit_official_16x16.weights.safetensors"


@pytest.fixture
def official(weights: Path, facts: dict[str, Any]) -> DCDiT:
    """Load the official weights into a DCDiT."""
    model = checkpoints.read(weights, num_heads=facts["config"]["num_heads"])
    assert isinstance(model, DCDiT)
    return model


@pytest.fixture
def run(official: DCDiT, cases: dict[str, Tensor]) -> Callable[..., Any]:
    """Return a function that runs the recorded inputs at a tail drop."""

    def call(tail_drop: float | Tensor = 0.0) -> Any:
        return official(cases["in.x"], timestep=cases["in.t"], class_labels=cases["in.y"], tail_drop=tail_drop)

    return call
