"""How close images are to those of another model from the same seeds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tokdyn.errors import InputError

SMALLEST = 11  # pixels of a window on a side
_SIGMA = 1.5  # both of Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861
_K1, _K2 = 0.01, 0.03


def psnr(images: Tensor, reference: Tensor, peak: float = 255.0) -> Tensor:
    """Peak signal-to-noise ratio, in dB.

    Args:
        images: (B, C, H, W).
        reference: (B, C, H, W).
        peak: largest value that a pixel can have.

    Returns:
        (B,) 10 log10(peak^2 / mean squared error), float64; infinite for equal images.

    Raises:
        InputError: the shapes differ.
    """
    _same_shape(images, reference)
    error = (images.double() - reference.double()).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(peak**2 / error)


def ssim(images: Tensor, reference: Tensor, peak: float = 255.0) -> Tensor:
    """Structural similarity (Wang et al. 2004, eq. 13): Gaussian windows of 11 pixels that lie inside, sigma 1.5.

    Args:
        images: (B, C, H, W).
        reference: (B, C, H, W).
        peak: largest value that a pixel can have.

    Returns:
        (B,) mean over windows and channels, float64; 1 for equal images.

    Raises:
        InputError: the shapes differ, or images are smaller than a window.
    """
    _same_shape(images, reference)
    if min(images.shape[-2:]) < SMALLEST:
        raise InputError(f"structural similarity needs images of {SMALLEST} pixels or more, got {images.shape[-2:]}.")
    x, y = images.double(), reference.double()
    mean_x, mean_y = _blurred(x), _blurred(y)
    var_x, var_y = _blurred(x * x) - mean_x.square(), _blurred(y * y) - mean_y.square()
    covariance = _blurred(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
    return similarity.flatten(1).mean(dim=1)


def feature_distance(features: Tensor, reference: Tensor) -> float:
    """Distance of images to their partners in the features of a network, over that of reference images to each other.

    Args:
        features: (N, F), N of 2 or more.
        reference: (N, F), row i from the same seed.

    Returns:
        0 for equal images; about 1 for images that have nothing to do with those of the reference.

    Raises:
        InputError: the shapes differ, or there is one image.
    """
    _same_shape(features, reference)
    if len(features) < 2:
        raise InputError("a distance of features needs two images or more.")
    apart = torch.pdist(reference.double()).mean()
    return float((features.double() - reference.double()).norm(dim=1).mean() / apart.clamp(min=1e-12))


def _blurred(x: Tensor) -> Tensor:
    offsets = torch.arange(SMALLEST, dtype=x.dtype, device=x.device) - SMALLEST // 2
    weights = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    channels = x.shape[1]
    for shape in ((channels, 1, SMALLEST, 1), (channels, 1, 1, SMALLEST)):
        kernel = weights.view(1, 1, *shape[2:]).expand(shape)
        x = F.conv2d(x, kernel, groups=channels)
    return x


def _same_shape(one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape:
        raise InputError(f"shapes {tuple(one.shape)} and {tuple(other.shape)} should be the same.")
