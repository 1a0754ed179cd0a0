"""A tiny model as training saves it, settings that sample it quickly, and the pictures read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tokdyn import DCDiT
from tokdyn.data.config import DataConfig

TINY = {"sample_size": (6, 8), "in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 2, "num_classes": 4}

NAMES = ("apple", "bear", "car", "dog")

FACTS = {
    "name": "tiny/run",
    "objective": {"kind": "noise"},
    "data": DataConfig(kind="shapes", num_classes=4).model_dump(mode="json"),
    "class_names": list(NAMES),
}

QUICK = {"steps": 3, "scheduler": "ddim", "device": "cpu"}


def tiny(seed: int, kind: type = DCDiT, **settings: object) -> torch.nn.Module:
    """Build a model with random weights, whose outputs are not zero."""
    torch.manual_seed(seed)
    model = kind(**{**TINY, "patch_size": 1, **settings})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
    return model


def png(path: Path) -> np.ndarray:
    """Read a picture as an array of shape (height, width, channels)."""
    with Image.open(path) as image:
        return np.asarray(image)
