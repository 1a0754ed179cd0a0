"""Read presets: published settings of methods for named models, and those that `tokdyn calibrate` writes.

A preset file (`tokdyn.presets.schema`) holds the models of a family, how to recognise them, and their settings with
what was published about them. The files that ship with the package are in recipes/presets.
"""

from tokdyn.presets.choosing import Chosen, choose
from tokdyn.presets.files import families, read, write
from tokdyn.presets.named import find, is_file, preset, published_for
from tokdyn.presets.schema import TIERS, Calibration, Entry, Family, Published, Setting, Source
from tokdyn.presets.table import PresetRow, listed

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
