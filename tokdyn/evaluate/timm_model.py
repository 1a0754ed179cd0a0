"""Use timm models as extractors: the features are those before the classifier, the logits are the classifier's."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from einops import rearrange
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from torch import Tensor

from tokdyn.checkpoints.pickles import load_pickled
from tokdyn.errors import CheckpointError
from tokdyn.evaluate.extractor import Extractor, ExtractorInfo


def open_timm(name: str, checkpoint: Path | None, input_size: int | None, device: torch.device) -> Extractor:
    """Open a timm model. It normalises images with the mean and standard deviation of its training.

    Args:
        name: timm's name of the model.
        checkpoint: File with the weights; None takes the pretrained ones.
        input_size: Side in pixels that images are resized to; None takes the size that the model was trained on.
        device: Device of the network.

    Raises:
        CheckpointError: timm has no such model, or its weights are missing or belong to another model.
    """
    if not timm.is_model(name):
        raise CheckpointError(f"timm has no model {name}: find names with `timm.list_models('*PART*')`.")
    network = _pretrained(name) if checkpoint is None else _from_file(name, checkpoint)
    network = network.eval().requires_grad_(False).to(device)
    data = resolve_model_data_config(network)  # type: ignore[no-untyped-call]
    mean, std = (rearrange(torch.tensor(data[name], device=device), "c -> 1 c 1 1") for name in ("mean", "std"))
    info = ExtractorInfo(
        kind="timm", name=name, sha256=_tensors_sha256(name, network), input_size=input_size or data["input_size"][-1]
    )

    def forward(images: Tensor) -> object:
        """Compute features (B, F) of uint8 images (B, 3, H, W) and, with a classifier, logits (B, C)."""
        x = network.forward_features((images.float() / 255 - mean) / std)
        features = network.forward_head(x, pre_logits=True)
        return (features, network.forward_head(x)) if network.num_classes > 0 else features

    return Extractor(info, forward, device)


def _pretrained(name: str) -> Any:
    """Create the model with its pretrained weights, from timm's local cache or the hub."""
    try:
        network: Any = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"The pretrained weights of timm:{name} are not available ({type(error).__name__}): give local ones with "
            "checkpoint=FILE, or use another network with extractor=FILE.ts."
        ) from error
    return network


def _from_file(name: str, checkpoint: Path) -> Any:
    """Create the model with weights from a file, and with the number of classes that the file has."""
    if not checkpoint.is_file():
        raise CheckpointError(f"There is no checkpoint {checkpoint} for timm:{name}: correct checkpoint=.")
    try:
        state: object = load_file(checkpoint) if checkpoint.suffix == ".safetensors" else load_pickled(checkpoint)
    except Exception as error:  # a damaged or hostile header can raise anything
        raise CheckpointError(
            f"{checkpoint} is neither a safetensors file nor a torch file of tensors alone: give a state dict."
        ) from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{checkpoint} is not a state dict, expected names with tensors: give one of timm:{name}."
        )
    network: Any = timm.create_model(name)
    head = state.get(f"{network.default_cfg.get('classifier')}.weight")
    if head is not None:
        network = timm.create_model(name, num_classes=len(head))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{checkpoint} does not hold the weights of timm:{name}: correct checkpoint=.") from error
    return network


def _tensors_sha256(name: str, network: Any) -> str:
    """Return a hash of the name and of every tensor, which does not depend on the file that the weights came from."""
    digest = hashlib.sha256(name.encode())
    for key, value in sorted(network.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
