"""Read and write checkpoints in the formats of official DC-DiT, facebook's DiT, SiT, DyDiT, diffusers and tokdyn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokdyn.lazy import loading

if TYPE_CHECKING:
    from tokdyn.checkpoints.convert import to_diffusers, to_facebook, to_official
    from tokdyn.checkpoints.files import Raw, open_file
    from tokdyn.checkpoints.formats import Kind, Layout
    from tokdyn.checkpoints.reader import read
    from tokdyn.checkpoints.writer import Written, write

__all__ = [
    "Kind",
    "Layout",
    "Raw",
    "Written",
    "open_file",
    "read",
    "to_diffusers",
    "to_facebook",
    "to_official",
    "write",
]

__getattr__ = loading(
    __name__,
    {
        "Kind": ".formats",
        "Layout": ".formats",
        "Raw": ".files",
        "Written": ".writer",
        "open_file": ".files",
        "read": ".reader",
        "to_diffusers": ".convert",
        "to_facebook": ".convert",
        "to_official": ".convert",
        "write": ".writer",
    },
)
