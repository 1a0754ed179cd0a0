"""Filter noise out of features before they are compared from step to step (SeaCache, arXiv 2602.18993).

The best linear denoiser at noise level t, the Wiener filter, passes the frequencies whose power in images is above that
of the noise: a few low ones at first, higher ones later. Images have the power `S(f) = |f|**-p`, noise has 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokdyn.tokens import Grid

IMAGE_POWER, VIDEO_POWER = 2.0, 3.0
"""The exponent p of the spectrum of natural images, and the one that the authors use for videos."""
_EDGE = 1e-6  # distance of noise levels from 0 and 1, where the filter has no value


def wiener_gain(cells: int, level: Tensor, power: float) -> Tensor:
    """Compute the Wiener filter along one axis, `(1 - t) S / ((1 - t)**2 S + t**2)`, scaled to a mean of 1.

    Args:
        cells: n, the length of the axis.
        level: (B,) noise levels t of noisy images `(1 - t) * image + t * noise`.
        power: p, the exponent of the spectrum.

    Returns:
        (B, n) gains of the frequencies, in the order of `torch.fft.fftfreq`.
    """
    t = level.float().clamp(_EDGE, 1.0 - _EDGE)[:, None]
    noise: Tensor = torch.fft.fftfreq(cells, device=level.device).abs() ** power  # 1 / S
    gain: Tensor = (1.0 - t) / ((1.0 - t) ** 2 + t**2 * noise)
    return gain / gain.mean(dim=1, keepdim=True)


def sea_filter(x: Tensor, grid: Grid, level: Tensor, power: float | None = None) -> Tensor:
    """Filter features by the product of the Wiener filters of their axes, which has a mean of 1, too.

    Args:
        x: (B, N, D) features of the cells of a grid.
        grid: of N cells.
        level: (B,) or (1,) noise levels.
        power: exponent of the spectrum; None takes that of videos if the grid has several frames, else of images.

    Returns:
        (B, N, D) fp32.
    """
    if power is None:
        power = VIDEO_POWER if len(grid) == 3 and grid[0] > 1 else IMAGE_POWER
    axes = tuple(range(1, len(grid) + 1))
    spectrum: Tensor = torch.fft.rfftn(x.float().reshape(len(x), *grid, x.shape[2]), dim=axes)
    for axis, cells in zip(axes, grid, strict=True):
        gain = wiener_gain(cells, level, power)[:, : spectrum.shape[axis]]
        shape = [len(gain), *(gain.shape[1] if each == axis else 1 for each in axes), 1]
        spectrum = spectrum * gain.view(shape)
    filtered: Tensor = torch.fft.irfftn(spectrum, s=grid, dim=axes)
    return filtered.reshape(x.shape)
