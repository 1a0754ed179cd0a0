"""Open a pipeline of diffusers from a folder or the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tokdyn.errors import CheckpointError
from tokdyn.files import json_object

INDEX = "model_index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CLASS_CONDITIONAL = ("DiTTransformer2DModel", "DiT", "DCDiT")  # commands treat these as models, with their own sampler


def names_pipeline(name: str | None) -> bool:
    """Return whether a name is that of a pipeline: its folder, or its hub id, with any but a class-conditional DiT.

    An id of the hub is looked up there, unless there is a folder of that name.
    """
    if name is None:
        return False
    folder = Path(name).expanduser()
    if folder.exists() or not _HUB_ID.fullmatch(name):
        path: Path | None = folder / INDEX
    else:
        path = _index_on_the_hub(name)
    entry = json_object(path).get("transformer") if path is not None and path.is_file() else None
    return isinstance(entry, list) and len(entry) == 2 and entry[1] not in _CLASS_CONDITIONAL


def _index_on_the_hub(name: str) -> Path | None:
    """Return the index of a pipeline in the cache of the hub's client; None if there is no such pipeline."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, INDEX))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError):
        return None  # the command says what is wrong with the name


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

    reader: Any = diffusers.DiffusionPipeline
    folder = Path(name).expanduser()
    try:
        pipe = reader.from_pretrained(str(folder) if folder.exists() else name, use_safetensors=True)
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{name} cannot be read as a pipeline of diffusers: {error}") from error
    if not isinstance(getattr(pipe, "transformer", None), torch.nn.Module):
        raise CheckpointError(f"{name} holds a {type(pipe).__name__}, which has no transformer.")
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, torch.bfloat16) if precision == "bf16" else pipe.to(device)
