"""Reading and writing checkpoints: official DC-DiT, facebook DiT, diffusers DiT and our own folders."""

from tokdyn.checkpoints.convert import to_diffusers, to_facebook, to_official
from tokdyn.checkpoints.files import Raw, open_file
from tokdyn.checkpoints.reader import Kind, read

__all__ = ["Kind", "Raw", "open_file", "read", "to_diffusers", "to_facebook", "to_official"]
