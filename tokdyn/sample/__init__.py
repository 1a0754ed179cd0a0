"""Sample images from a trained model and write them to files: `sample(SampleConfig(model="runs/x", count=16))`."""

from tokdyn.sample.config import SampleConfig
from tokdyn.sample.costs import StepCost
from tokdyn.sample.loading import ModelInfo, load_model
from tokdyn.sample.result import BudgetResult, SampleResult
from tokdyn.sample.run import sample

__all__ = ["BudgetResult", "ModelInfo", "SampleConfig", "SampleResult", "StepCost", "load_model", "sample"]
