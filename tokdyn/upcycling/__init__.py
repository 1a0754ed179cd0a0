"""Upcycling: a DC-DiT, or another model that computes less, from a pretrained one (arXiv 2603.06351).

`tokdyn.upcycle(base, "dc", target=4)` builds the model, `tokdyn upcycle` trains it too.
"""

from tokdyn.upcycling.conversion import to_dc, upcycle
from tokdyn.upcycling.distillation import Distillation
from tokdyn.upcycling.pipelines import CallResult, CallSettings, distil
from tokdyn.upcycling.report import UpcycleReport, report

__all__ = ["CallResult", "CallSettings", "Distillation", "UpcycleReport", "distil", "report", "to_dc", "upcycle"]
