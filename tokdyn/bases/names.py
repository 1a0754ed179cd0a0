"""Decide what a user's name for a model means, without loading it, the network or torch."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from tokdyn.bases.table import rows
from tokdyn.errors import CheckpointError
from tokdyn.models.sizes import PATCHES, is_named

HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?::(?P<inside>[^:]+))?")
"""OWNER/REPO or OWNER/REPO:FILE_OR_FOLDER."""
INDEX = "model_index.json"
"""The file of a pipeline of diffusers that lists its components."""


def check_name(name: str) -> None:
    """Refuse a name that cannot be that of a model with weights.

    Raises:
        CheckpointError: the name is neither an existing path, nor listed by `tokdyn models` with weights, nor a hub id.
    """
    if (name and Path(name).expanduser().exists()) or name in rows():
        return
    if is_size(name):
        trained = ", ".join(row for row in rows() if row.removeprefix("DC-").startswith("DiT-"))
        raise CheckpointError(
            f"{name} is a size, of which there are no trained weights; give a pretrained model ({trained}), or train a "
            f"model of this size with tokdyn train RECIPE {size_settings(name)}."
        )
    if not HUB_ID.fullmatch(name) or name.startswith(("./", "../", "~/")):
        raise CheckpointError(
            f"there is no model {name!r}, and no such path{suggestion(name)}; give a path, a name that `tokdyn models` "
            "lists as pretrained, or OWNER/REPO[:FILE_OR_FOLDER] of the hub. Families and classes are no models by "
            "themselves."
        )


def is_size(name: str) -> bool:
    """Return whether a name is that of a size without weights, such as DiT-S/2."""
    _, slash, patch = name.partition("/")
    return is_named(name) and (not slash or patch in map(str, PATCHES))


def size_settings(name: str) -> str:
    """Return the settings of a recipe for a named size, such as "model.kind=dit model.name=S/2"."""
    kind = "dcdit" if name.startswith("DC-") else "dit"
    return f"model.kind={kind} model.name={name.removeprefix('DC-').removeprefix('DiT-')}"


def suggestion(name: str) -> str:
    """Return a hint with the listed name that is most like a wrong one, or ""."""
    near = difflib.get_close_matches(name, rows(), n=1, cutoff=0.75)
    return f" (did you mean {near[0]!r}?)" if near else ""
