"""Open a pipeline of diffusers from a folder or the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from tokdyn.errors import CheckpointError
from tokdyn.files import json_object

INDEX = "model_index.json"
_UNREACHABLE = "it cannot be reached"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CLASS_CONDITIONAL = ("DiTTransformer2DModel", "DiT", "DCDiT")  # commands treat these as models, with their own sampler


def names_pipeline(name: str | None, wanted: bool = False) -> bool:
    """Return whether a name is that of a pipeline: its folder, or its hub id, with any but a class-conditional DiT.

    An id of the hub is looked up there, unless there is a folder of that name.

    Args:
        name: folder or hub id.
        wanted: whether it should be one.

    Raises:
        CheckpointError: it is none although it should be.
    """
    if name is None:
        return False
    folder, reason = Path(name).expanduser(), f"{INDEX} is missing there"
    if folder.exists():
        path = folder / INDEX
    elif _HUB_ID.fullmatch(name):
        path, reason = _index_on_the_hub(name)
        reason = f"there is no such folder, and on the hub {reason}"
    else:
        path, reason = folder / INDEX, "there is no such folder"
    if path.is_file():
        entry = json_object(path).get("transformer")
        if isinstance(entry, list) and len(entry) == 2 and entry[1] not in _CLASS_CONDITIONAL:
            return True
        reason = "it has no transformer that draws prompts"
    if wanted:
        raise CheckpointError(f"{name} cannot be read as a pipeline of diffusers, which prompts are for: {reason}.")
    return False


def _index_on_the_hub(name: str) -> tuple[Path, str]:
    """Return the index of a pipeline in the cache of the hub's client, and why there is none."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(name, INDEX)), ""
    except errors.GatedRepoError:
        reason = "access to it has to be granted (accept its licence there, then run hf auth login)"
    except errors.RepositoryNotFoundError:
        reason = "there is no such repository, or it is private"
    except errors.LocalEntryNotFoundError:
        reason = _UNREACHABLE
    except errors.EntryNotFoundError:
        reason = f"it holds no {INDEX}"
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError):
        reason = _UNREACHABLE
    return Path(name) / INDEX, reason


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
