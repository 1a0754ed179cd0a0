"""Sample images from a trained model and write them to files: `sample(SampleConfig(model="runs/x", count=16))`.

The names are loaded when they are first used, so that `tokdyn sample --help` loads no model code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokdyn.lazy import loading

if TYPE_CHECKING:
    from tokdyn.sample.config import SampleConfig
    from tokdyn.sample.costs import StepCost
    from tokdyn.sample.loading import ModelInfo, load_model
    from tokdyn.sample.result import BudgetResult, SampleResult
    from tokdyn.sample.run import sample

__all__ = ["BudgetResult", "ModelInfo", "SampleConfig", "SampleResult", "StepCost", "load_model", "sample"]

__getattr__ = loading(
    __name__,
    {
        "BudgetResult": ".result",
        "ModelInfo": ".loading",
        "SampleConfig": ".config",
        "SampleResult": ".result",
        "StepCost": ".costs",
        "load_model": ".loading",
        "sample": ".run",
    },
)
