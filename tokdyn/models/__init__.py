"""tokdyn's own models, DiT and the Dynamic Chunking DiT (DC-DiT), as diffusers models."""

from tokdyn.models.base import DCDiTOutput, DiTOutput
from tokdyn.models.dc_dit import DCDiT
from tokdyn.models.dit import DiT

__all__ = ["DCDiT", "DCDiTOutput", "DiT", "DiTOutput"]
