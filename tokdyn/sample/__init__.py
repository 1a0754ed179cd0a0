"""Sample images from a trained model and write them to files: `sample(SampleConfig(model="runs/x", count=16))`.

The names are loaded when they are first used, so that `tokdyn sample --help` loads no model code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokdyn.sample.config import SampleConfig
    from tokdyn.sample.costs import StepCost
    from tokdyn.sample.loading import ModelInfo, load_model
    from tokdyn.sample.result import BudgetResult, SampleResult
    from tokdyn.sample.run import sample

__all__ = ["BudgetResult", "ModelInfo", "SampleConfig", "SampleResult", "StepCost", "load_model", "sample"]

_MODULES = {
    "BudgetResult": "result",
    "ModelInfo": "loading",
    "SampleConfig": "config",
    "SampleResult": "result",
    "StepCost": "costs",
    "load_model": "loading",
    "sample": "run",
}


def __getattr__(name: str) -> object:
    """Load a name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value
