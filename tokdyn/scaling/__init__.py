"""Work out what a training needs on many GPUs: memory, FLOPs, bytes on the wire, images per second and hours.

A `Work` says what a step takes, whatever computes it, and `worked_out` puts it on a number of the GPUs in `HARDWARE`.
What lives during a step is found in `rehearsal`, on tensors that have shapes and no values, so that models of any size
take seconds and no memory. Nothing here was measured on a GPU; docs/scaling.md says what was checked.

Public names are loaded when they are first used, because settings are read before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokdyn.lazy import loading

if TYPE_CHECKING:
    from tokdyn.scaling.hardware import HARDWARE, Gpu
    from tokdyn.scaling.plan import Plan, worked_out
    from tokdyn.scaling.settings import ScalingSettings
    from tokdyn.scaling.work import Work

__all__ = ["HARDWARE", "Gpu", "Plan", "ScalingSettings", "Work", "worked_out"]

__getattr__ = loading(
    __name__,
    {
        **dict.fromkeys(("HARDWARE", "Gpu"), ".hardware"),
        **dict.fromkeys(("Plan", "worked_out"), ".plan"),
        "ScalingSettings": ".settings",
        "Work": ".work",
    },
)
