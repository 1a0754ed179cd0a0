"""Measuring generated images: Frechet distance, class score, kernel distance, precision, recall, class accuracy.

The formulas are torch-fidelity's. The numbers are called FID, IS and KID only if the published Inception network made
them; with any other network they carry its name.
"""

from tokdyn.evaluate.config import EvalConfig
from tokdyn.evaluate.result import EvalResult
from tokdyn.evaluate.run import evaluate

__all__ = ["EvalConfig", "EvalResult", "evaluate"]
