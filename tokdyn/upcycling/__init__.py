"""Upcycling (arXiv 2603.06351): a student with fewer tokens or less width, made from a pretrained model and trained.

`tokdyn.upcycle(base, "dc", target=4)` builds the student. `tokdyn upcycle` also trains it: a recipe takes the student
of a `DiT` through the phases of its section `upcycle`; `distil` trains the transformer of a text-to-image pipeline on
calls that were recorded while the pipeline drew images.
"""

from tokdyn.upcycling.conversion import to_dc, upcycle
from tokdyn.upcycling.distillation import Distillation
from tokdyn.upcycling.pipelines import DistilResult, DistilSettings, distil
from tokdyn.upcycling.report import UpcycleReport, report

__all__ = ["DistilResult", "DistilSettings", "Distillation", "UpcycleReport", "distil", "report", "to_dc", "upcycle"]
