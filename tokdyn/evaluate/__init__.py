"""Measure generated images: Frechet distance, class score, kernel distance, precision, recall, class accuracy.

The formulas are torch-fidelity's. The first three are called FID, IS and KID only if they were measured with the
published Inception network; otherwise their names say which network it was, as in `frechet_distance[NETWORK]`. An
extractor is a network that maps images to the features (and logits) that the metrics are computed from.


The names are loaded when they are first used, so that `tokdyn eval --help` loads no model code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokdyn.lazy import loading

if TYPE_CHECKING:
    from tokdyn.evaluate.config import EvalConfig
    from tokdyn.evaluate.result import EvalResult
    from tokdyn.evaluate.run import evaluate

__all__ = ["EvalConfig", "EvalResult", "evaluate"]

__getattr__ = loading(__name__, {"EvalConfig": ".config", "EvalResult": ".result", "evaluate": ".run"})
