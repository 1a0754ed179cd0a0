"""Decide what a user's name for a model means, without loading the model or torch."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from tokdyn.bases.table import HUB_ID, INDEX, SHIPPED, rows
from tokdyn.checkpoints.formats import PICKLED
from tokdyn.errors import CheckpointError
from tokdyn.files import json_object, user_path
from tokdyn.models.sizes import PATCHES, is_named

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = (".safetensors", *PICKLED)
_CLASS_CONDITIONAL = ("DiTTransformer2DModel", "DiT", "DCDiT")  # commands treat these as models, with their own sampler


def check_name(name: str) -> None:
    """Refuse a name that cannot be that of a model with weights.

    Raises:
        CheckpointError: the name is neither an existing path, nor listed by `tokdyn models` with weights, nor a hub id.
    """
    if (name and user_path(name).exists()) or name in rows():
        return
    if name in SHIPPED:
        raise CheckpointError(
            f"{name} is not part of this installation; install a tokdyn that holds it, or train it (tokdyn recipes ls) "
            "and give the folder of the run."
        )
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


def check_weights(name: str) -> None:
    """Refuse a path that leads to no file of weights; names and hub ids pass.

    Raises:
        CheckpointError: the folder holds none, or the file has another ending.
    """
    path = user_path(name)
    if path.exists() and not any(each.suffix in _WEIGHTS for each in (path.rglob("*") if path.is_dir() else (path,))):
        raise CheckpointError(
            f"{name} holds no weights: give the folder of a run or of a model, a .safetensors file or a .pt file, or a "
            "name that `tokdyn models` lists as pretrained."
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


def names_pipeline(name: str | None, wanted: bool = False) -> bool:
    """Return whether a name is that of a pipeline: its folder, or its hub id, with any but a class-conditional DiT.

    An id of the hub is looked up there, unless it is in the cache, there is a folder of that name, or tokdyn has a
    model of that name. A hub that does not answer within a few seconds has no such pipeline.

    Args:
        name: folder or hub id.
        wanted: whether it should be one.

    Raises:
        CheckpointError: it is none although it should be.
    """
    if name is None or name in rows() or name in SHIPPED or is_named(name):
        return False
    folder = user_path(name)
    index: Path | None = folder / INDEX
    reason = f"{INDEX} is missing there" if folder.exists() else "there is no such folder"
    if _REPOSITORY.fullmatch(name) and not folder.exists():
        from tokdyn.bases.hub import pipeline_index

        index, why = pipeline_index(name)
        reason = f"{reason}, and on the hub {why}"
    if index is not None and index.is_file():
        entry = json_object(index).get("transformer")
        if isinstance(entry, list) and len(entry) == 2 and entry[1] not in _CLASS_CONDITIONAL:
            return True
        reason = "it has no transformer that draws prompts"
    if wanted:
        raise CheckpointError(f"{name} cannot be read as a pipeline of diffusers, which prompts are for: {reason}.")
    return False
