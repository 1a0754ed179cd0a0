"""Open bases, the pretrained models to start from, by name, hub id or path."""

from tokdyn.bases.opening import Base, open_base, read_base
from tokdyn.bases.table import Row, rows

__all__ = ["Base", "Row", "open_base", "read_base", "rows"]
