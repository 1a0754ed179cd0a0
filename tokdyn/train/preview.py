"""Sample grids and boundary maps during a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tokdyn.recipe import Recipe


def draw_preview(model: Any, recipe: Recipe, folder: Path, step: int, device: torch.device) -> list[Path]:
    """Write sample grids and boundary maps of a step."""
    return []
