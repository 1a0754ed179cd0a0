"""Read and write checkpoints of official DC-DiT, facebook DiT, SiT, DyDiT, diffusers DiT and tokdyn itself."""

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
