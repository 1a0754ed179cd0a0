"""Name the formats that checkpoints are read from and written in. This module loads no torch."""

from __future__ import annotations

from typing import Literal

Kind = Literal["dc-dit", "dit", "sit", "repa", "dydit", "diffusers", "tokdyn"]
"""Formats: official DC-DiT, facebook's DiT, SiT and the SiT of REPA (with the tensor names of facebook's DiT), DyDiT,
diffusers' DiT, tokdyn's own."""
Layout = Literal["diffusers", "tokdyn", "official", "facebook"]
"""Formats that can be written."""
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
"""Endings of files that torch.save writes."""
