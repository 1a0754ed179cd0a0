"""Measure the similarity of images to those that a reference model draws from the same seeds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import repeat
from torch import Tensor

from tokdyn.errors import InputError

WINDOW = 11
"""Side of SSIM's window in pixels."""
_SIGMA = 1.5  # pixels; window and sigma are those of Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861
_K1, _K2 = 0.01, 0.03  # stabilising constants of the same paper


def psnr(images: Tensor, reference: Tensor, peak: float = 255.0) -> Tensor:
    """Compute the peak signal-to-noise ratio (PSNR) in dB.

    Args:
        images: (B, C, H, W).
        reference: (B, C, H, W).
        peak: largest possible value of a pixel.

    Returns:
        (B,) float64, `10 * log10(peak**2 / mse)`; infinite for equal images.

    Raises:
        InputError: the shapes differ.
    """
    _check_same_shape(images, reference)
    error = (images.double() - reference.double()).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(peak**2 / error)


def ssim(images: Tensor, reference: Tensor, peak: float = 255.0) -> Tensor:
    """Compute the structural similarity (SSIM; Wang et al. 2004, eq. 13) over Gaussian windows inside the image.

    Args:
        images: (B, C, H, W).
        reference: (B, C, H, W).
        peak: largest possible value of a pixel.

    Returns:
        (B,) float64, mean over windows and channels; 1 for equal images.

    Raises:
        InputError: the shapes differ, or the images are smaller than a window of 11 pixels.
    """
    _check_same_shape(images, reference)
    if min(images.shape[-2:]) < WINDOW:
        rows, columns = images.shape[-2:]
        raise InputError(
            f"SSIM needs images of at least {WINDOW}x{WINDOW} pixels, but these have {rows}x{columns}: compare larger "
            "images, or use PSNR."
        )
    x, y = images.double(), reference.double()
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x.square(), _blur(y * y) - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    return similarity.flatten(1).mean(dim=1)


def feature_distance(features: Tensor, reference: Tensor) -> float:
    """Compute the mean distance between paired features, divided by the mean distance among the reference features.

    Args:
        features: (N, F) features of the images, N of 2 or more.
        reference: (N, F) features of the reference images; row i belongs to the same seed as row i of `features`.

    Returns:
        0 for equal images, about 1 for images that are unrelated to the reference.

    Raises:
        InputError: the shapes differ, or there are fewer than two images.
    """
    _check_same_shape(features, reference)
    if len(features) < 2:
        raise InputError(f"A feature distance needs at least two images, got {len(features)}: give more.")
    scale = torch.pdist(reference.double()).mean().clamp(min=1e-12)
    return float((features.double() - reference.double()).norm(dim=1).mean() / scale)


def _blur(x: Tensor) -> Tensor:
    """Average (B, C, H, W) over Gaussian windows, without padding: (B, C, H - 10, W - 10)."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    channels = x.shape[1]
    for pattern in ("w -> c 1 w 1", "w -> c 1 1 w"):
        x = F.conv2d(x, repeat(weights, pattern, c=channels), groups=channels)
    return x


def _check_same_shape(images: Tensor, reference: Tensor) -> None:
    """Raise an InputError if the shapes differ."""
    if images.shape != reference.shape:
        raise InputError(
            f"images has shape {tuple(images.shape)} and reference {tuple(reference.shape)}: give two tensors of the "
            "same shape."
        )
