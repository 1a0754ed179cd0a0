"""Dynamic token computation for diffusion transformers."""

__version__ = "0.1.0.dev0"
