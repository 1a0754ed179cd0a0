"""Open bases, the pretrained models to start from, by name, hub id or path.

The names are loaded when they are first used, so that names of models can be checked before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokdyn.lazy import loading

if TYPE_CHECKING:
    from tokdyn.bases.opening import Base, open_base, read_base
    from tokdyn.bases.table import Row, rows

__all__ = ["Base", "Row", "open_base", "read_base", "rows"]

__getattr__ = loading(
    __name__,
    {"Base": ".opening", "Row": ".table", "open_base": ".opening", "read_base": ".opening", "rows": ".table"},
)
