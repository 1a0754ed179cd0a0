"""Open a pipeline of diffusers from a folder or the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokdyn.bases.names import INDEX
from tokdyn.bases.table import rows
from tokdyn.errors import CheckpointError
from tokdyn.files import json_object
from tokdyn.models.sizes import is_named

if TYPE_CHECKING:
    import torch

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CLASS_CONDITIONAL = ("DiTTransformer2DModel", "DiT", "DCDiT")  # commands treat these as models, with their own sampler


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
    if name is None or name in rows() or is_named(name):
        return False
    folder = Path(name).expanduser()
    index: Path | None = folder / INDEX
    reason = f"{INDEX} is missing there" if folder.exists() else "there is no such folder"
    if _HUB_ID.fullmatch(name) and not folder.exists():
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


def open_pipeline(name: str, device: torch.device, precision: str = "fp32") -> Any:
    """Load a pipeline onto a device, with its progress bars off. Weights are read from safetensors files only.

    Args:
        name: folder or hub id.
        device: of the whole pipeline.
        precision: "fp32", or "bf16" of the weights.

    Raises:
        CheckpointError: it cannot be read as a pipeline, or has no transformer.
    """
    import diffusers
    import torch

    from tokdyn.hub import reachable

    reader: Any = diffusers.DiffusionPipeline
    folder = Path(name).expanduser()
    where, offline = (str(folder), True) if folder.exists() else (name, not reachable())
    try:
        pipe = reader.from_pretrained(where, use_safetensors=True, local_files_only=offline)
    except Exception as error:  # readers of damaged components raise errors of all kinds
        why = " ".join(str(error).split())
        raise CheckpointError(f"{name} cannot be read as a pipeline of diffusers: {why}") from error
    if not isinstance(getattr(pipe, "transformer", None), torch.nn.Module):
        raise CheckpointError(f"{name} holds a {type(pipe).__name__}, which has no transformer.")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, torch.bfloat16) if precision == "bf16" else pipe.to(device)
