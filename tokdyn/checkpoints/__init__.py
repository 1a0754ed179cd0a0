"""Read and write checkpoints in the formats of official DC-DiT, facebook's DiT, SiT, DyDiT, diffusers and tokdyn."""

from tokdyn.checkpoints.convert import to_diffusers, to_facebook, to_official
from tokdyn.checkpoints.files import Raw, open_file
from tokdyn.checkpoints.reader import Kind, read
from tokdyn.checkpoints.writer import Layout, Written, write

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
