"""Pretrained models to begin with: by name, hub id, path, or shipped with the package."""

from tokdyn.bases.opening import Base, open_base, read_base
from tokdyn.bases.table import Row, rows

__all__ = ["Base", "Row", "open_base", "read_base", "rows"]
