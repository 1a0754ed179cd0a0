"""Open a pipeline of diffusers from a folder or the hub."""

from __future__ import annotations

from typing import Any

import torch

from tokdyn.errors import CheckpointError
from tokdyn.files import user_path
from tokdyn.hub import reachable


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
    folder = user_path(name)
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
