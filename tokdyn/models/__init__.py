"""tokdyn's own models, DiT and the Dynamic Chunking DiT (DC-DiT), as diffusers models.

The names are loaded when they are first used, so that names and sizes of models can be checked before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokdyn.lazy import loading

if TYPE_CHECKING:
    from tokdyn.models.base import DCDiTOutput, DiTOutput
    from tokdyn.models.dc_dit import DCDiT
    from tokdyn.models.dit import DiT

__all__ = ["DCDiT", "DCDiTOutput", "DiT", "DiTOutput"]

__getattr__ = loading(__name__, {"DCDiT": ".dc_dit", "DCDiTOutput": ".base", "DiT": ".dit", "DiTOutput": ".base"})
