"""Upcycle a pretrained model, the base: make a student that computes less from it, and train the student.

`tokdyn.upcycle(base, "dc", target=4)` builds the student (arXiv 2603.06351), and `tokdyn upcycle` also trains it. The
student of a `DiT` is trained by a recipe, whose section `upcycle` divides the run into phases. The transformer of a
text-to-image pipeline is trained by `distil`, on calls that were recorded while the pipeline drew images.

Public names are loaded when they are first used, because the schema of recipes imports `settings` and no model code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokdyn.lazy import loading

if TYPE_CHECKING:
    from tokdyn.upcycling.comparison import UpcycleReport, report
    from tokdyn.upcycling.conversion import to_dc, upcycle
    from tokdyn.upcycling.distil_settings import DistilSettings
    from tokdyn.upcycling.distillation import Distillation
    from tokdyn.upcycling.pipelines import DistilResult, distil

__all__ = ["DistilResult", "DistilSettings", "Distillation", "UpcycleReport", "distil", "report", "to_dc", "upcycle"]

__getattr__ = loading(
    __name__,
    {
        **dict.fromkeys(("UpcycleReport", "report"), ".comparison"),
        **dict.fromkeys(("to_dc", "upcycle"), ".conversion"),
        "Distillation": ".distillation",
        "DistilSettings": ".distil_settings",
        **dict.fromkeys(("DistilResult", "distil"), ".pipelines"),
    },
)
