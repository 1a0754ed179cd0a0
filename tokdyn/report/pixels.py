"""Convert images in [-1, 1] to bytes, and write bytes as PNG files."""

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
"""One RGB image (H, W, 3), or a batch (B, H, W, 3), as a NumPy array of bytes."""


def to_pixels(images: Tensor) -> Pixels:
    """Convert images to RGB bytes. This inverts the scaling from bytes to [-1, 1] that `tokdyn.data` applies.

    Args:
        images: (B, C, H, W) in [-1, 1]; values outside are clamped. A single channel is repeated to RGB, and of more
            than three the first three are taken.

    Returns:
        (B, H, W, 3) uint8, on the CPU.

    Raises:
        InputError: the images have another number of dimensions, or 2 channels.
    """
    if images.dim() != 4 or images.shape[1] == 2:
        raise InputError(f"images has shape {tuple(images.shape)}, expected (B, C, H, W) with 1 channel, or 3 or more.")
    colour = images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
    levels = ((colour.float() + 1.0) * 127.5).round().clamp(0.0, 255.0).to(torch.uint8)
    pixels: Pixels = rearrange(levels, "b c h w -> b h w c").contiguous().cpu().numpy()
    return pixels


def write_png(pixels: Pixels, path: Path) -> Path:
    """Write an image (H, W, 3) uint8 as PNG, and return `path`.

    The file is written atomically and replaces an existing one. The folder is created if needed.
    """
    with replacing(path) as half:
        Image.fromarray(pixels).save(half, format="PNG")
    return path
