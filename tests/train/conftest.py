"""A model and data small enough to train in tests."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from tokdyn.recipe import Recipe, files, resolve

TINY = {
    "model": {"kind": "dcdit", "name": "tiny", "patch_size": 2, "hidden_size": 32, "depth": 1, "num_heads": 2},
    "data": {"kind": "shapes", "size": 16, "length": 64},
    "optimizer": {"lr": 1e-3},
    "training": {"batch_size": 4, "steps": 2, "precision": "fp32", "log_every": 1},
}


def tiny(folder: Path, *settings: str) -> Recipe:
    return resolve(files.deep_merge({**TINY, "out": str(folder)}, files.parse_overrides(settings)))


def quiet() -> Console:
    return Console(file=io.StringIO())
