"""Read presets: published settings of methods for named models, and those that `tokdyn calibrate` writes.

A preset file (`tokdyn.presets.schema`) holds the models of a family, how to recognise them, and their settings with
what was published about them. The files that ship with the package are in recipes/presets. Public names are loaded when
they are first used, because names of presets are looked up without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokdyn.lazy import loading

if TYPE_CHECKING:
    from tokdyn.presets.choosing import Chosen, choose
    from tokdyn.presets.files import families, read, write
    from tokdyn.presets.named import find, preset, published_for
    from tokdyn.presets.rows import PresetRow, is_file
    from tokdyn.presets.schema import TIERS, Calibration, Entry, Family, Published, Setting, Source
    from tokdyn.presets.table import listed

__all__ = [
    "TIERS",
    "Calibration",
    "Chosen",
    "Entry",
    "Family",
    "PresetRow",
    "Published",
    "Setting",
    "Source",
    "choose",
    "families",
    "find",
    "is_file",
    "listed",
    "preset",
    "published_for",
    "read",
    "write",
]

__getattr__ = loading(
    __name__,
    {
        **dict.fromkeys(("Chosen", "choose"), ".choosing"),
        **dict.fromkeys(("families", "read", "write"), ".files"),
        **dict.fromkeys(("find", "preset", "published_for"), ".named"),
        **dict.fromkeys(("PresetRow", "is_file"), ".rows"),
        **dict.fromkeys(("TIERS", "Calibration", "Entry", "Family", "Published", "Setting", "Source"), ".schema"),
        "listed": ".table",
    },
)
