"""Upcycling: a DC-DiT, or another model that computes less, from a pretrained one (arXiv 2603.06351).

`tokdyn.upcycle(base, "dc", target=4)` builds the model, `tokdyn upcycle` trains it too.
"""

from tokdyn.upcycling.api import upcycle
from tokdyn.upcycling.dc import to_dc
from tokdyn.upcycling.distill import Distillation
from tokdyn.upcycling.report import UpcycleReport, report

__all__ = ["Distillation", "UpcycleReport", "report", "to_dc", "upcycle"]
