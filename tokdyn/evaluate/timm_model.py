"""An extractor from timm: pooled features before the classifier, and the classifier's logits."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from torch import Tensor

from tokdyn.errors import CheckpointError
from tokdyn.evaluate.extractor import Extractor, ExtractorInfo


def open_timm(name: str, checkpoint: Path | None, input_size: int | None, device: torch.device) -> Extractor:
    """Loads `name` with local weights, or with its pretrained ones.

    Images are resized to `input_size`, or to the size the model was trained on, and normalised as it was trained.

    Raises:
        CheckpointError: timm has no such model, or its weights are missing or of another model.
    """
    if not timm.is_model(name):
        raise CheckpointError(f"timm has no model {name}: `timm.list_models('*PART*')` finds names")
    network = _pretrained(name) if checkpoint is None else _from_file(name, checkpoint)
    network = network.eval().requires_grad_(False).to(device)
    data = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    mean = torch.tensor(data["mean"], device=device).view(1, -1, 1, 1)
    std = torch.tensor(data["std"], device=device).view(1, -1, 1, 1)
    info = ExtractorInfo(
        kind="timm", name=name, sha256=_tensors_sha256(name, network), input_size=input_size or data["input_size"][-1]
    )

    def forward(images: Tensor) -> object:
        """(B, 3, H, W) uint8 -> features (B, F) and, with a classifier, logits (B, C)."""
        x = network.forward_features((images.float() / 255 - mean) / std)
        features = network.forward_head(x, pre_logits=True)
        return (features, network.forward_head(x)) if network.num_classes > 0 else features

    return Extractor(info, forward, device)


def _pretrained(name: str) -> Any:
    """The model with the weights timm names for it, from the local cache or the hub."""
    try:
        network: Any = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"the pretrained weights of timm:{name} cannot be had ({type(error).__name__}): give local ones with "
            "checkpoint=FILE, or use another network with extractor=FILE.ts"
        ) from error
    return network


def _from_file(name: str, checkpoint: Path) -> Any:
    """The model with weights from a file; its number of classes is that of the file."""
    if not checkpoint.is_file():
        raise CheckpointError(f"there is no checkpoint {checkpoint} for timm:{name}")
    try:
        if checkpoint.suffix == ".safetensors":
            state: object = load_file(checkpoint)
        else:
            state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise CheckpointError(f"{checkpoint} is neither safetensors nor a plain file of tensors") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{checkpoint} is not a state dict: expected names with tensors")
    network: Any = timm.create_model(name)
    head = state.get(f"{network.default_cfg.get('classifier')}.weight")
    if head is not None:
        network = timm.create_model(name, num_classes=len(head))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint} does not hold the weights of timm:{name}") from error
    return network


def _tensors_sha256(name: str, network: Any) -> str:
    """SHA-256 of the name and every tensor: the same weights hash the same, however they were stored."""
    digest = hashlib.sha256(name.encode())
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
