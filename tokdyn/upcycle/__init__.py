"""Upcycling: a DC-DiT, or another model that computes less, from a pretrained one (arXiv 2603.06351).

`tokdyn.upcycle(base, "dc", target=4)` makes the model, `tokdyn upcycle` trains it too.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from tokdyn.upcycle.api import upcycle
from tokdyn.upcycle.dc import to_dc
from tokdyn.upcycle.distill import Distillation
from tokdyn.upcycle.report import UpcycleReport, report

__all__ = ["Distillation", "UpcycleReport", "report", "to_dc", "upcycle"]


class _Callable(ModuleType):
    """Lets `tokdyn.upcycle(base, ...)` work although `tokdyn.upcycle` is also the package that holds it."""

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        return upcycle(*inputs, **keywords)


sys.modules[__name__].__class__ = _Callable
