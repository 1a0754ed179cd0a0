"""Constructor settings of named models: S, B, L and XL of the papers (arXiv 2212.09748, 2603.06351), and "tiny"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokdyn.errors import InputError

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "depth": 2, "num_heads": 2},
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}
PATCHES = (1, 2, 4, 8)


def is_named(name: str) -> bool:
    """Return whether `name` is that of a named model such as DiT-XL/2 or DC-DiT-S."""
    size, _, patch = name.removeprefix("DC-").removeprefix("DiT-").partition("/")
    return size in SHAPES and (name.startswith("DC-DiT-") if not patch else not name.startswith("DC-"))


def dit_settings(name: str) -> dict[str, Any]:
    """Return the constructor settings of a named DiT.

    Args:
        name: size and patch size, such as "XL/2" or "DiT-XL/2".

    Raises:
        InputError: there is no such size or patch size.
    """
    size, _, patch = name.removeprefix("DiT-").partition("/")
    if size not in SHAPES or patch not in {str(p) for p in PATCHES}:
        known = ", ".join(f"{s}/{{{','.join(map(str, PATCHES))}}}" for s in SHAPES)
        raise InputError(f"there is no DiT named '{name}'; known are {known}, for example 'XL/2'.")
    return {**SHAPES[size], "patch_size": int(patch)}


def dc_dit_settings(name: str) -> dict[str, Any]:
    """Return the constructor settings of a named DC-DiT.

    Args:
        name: the size, such as "S" or "DC-DiT-S".

    Raises:
        InputError: there is no such size.
    """
    size = name.removeprefix("DC-DiT-")
    if size not in SHAPES:
        raise InputError(f"there is no DC-DiT named '{name}'; known are {', '.join(SHAPES)}.")
    return dict(SHAPES[size])


def renamed_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the settings of a DC-DiT that were saved by an earlier version of tokdyn; return others unchanged.

    `smoothing`, a bool, and `smoothing_sigma`, a number, became `sigma`, which is None without smoothing.
    """
    current = dict(settings)
    if not {"smoothing", "smoothing_sigma"} & set(current):
        return current
    smoothing, width = current.pop("smoothing", True), current.pop("smoothing_sigma", current.get("sigma", 1.0))
    return {**current, "sigma": width if smoothing else None}
