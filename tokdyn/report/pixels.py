"""From model outputs to bytes, and bytes to PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.files import replacing

Pixels = NDArray[np.uint8]


def to_pixels(images: Tensor) -> Pixels:
    """Turn images into colour bytes, the inverse of how `tokdyn.data` reads them.

    Args:
        images: (B, C, H, W) in [-1, 1]; values outside are clamped. Grey becomes colour; of more than 3 channels the
            first 3 are shown.

    Returns:
        (B, H, W, 3) uint8.
    """
    if images.dim() != 4 or images.shape[1] == 2:
        raise InputError(f"images have shape {tuple(images.shape)}, expected (B, 1, 3 or more channels, H, W).")
    colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    levels = ((colour.float() + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)
    pixels: Pixels = levels.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels


def write_png(pixels: Pixels, path: Path) -> Path:
    """Write (H, W, 3) uint8 so that a reader finds the whole file or none, making the folder if need be."""
    with replacing(path) as half:
        Image.fromarray(pixels).save(half, format="PNG")
    return path
