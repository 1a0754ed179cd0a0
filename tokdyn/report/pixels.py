"""Converts model outputs to bytes, and writes bytes as PNG files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from tokdyn.errors import InputError
from tokdyn.files import replacing

Pixels = NDArray[np.uint8]


def to_pixels(images: Tensor) -> Pixels:
    """Convert images to colour bytes; the inverse of how `tokdyn.data` reads them.

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
    pixels: Pixels = rearrange(levels, "b c h w -> b h w c").contiguous().cpu().numpy()
    return pixels


def write_png(pixels: Pixels, path: Path) -> Path:
    """Write (H, W, 3) uint8 atomically, creating the folder if needed."""
    with replacing(path) as half:
        Image.fromarray(pixels).save(half, format="PNG")
    return path
