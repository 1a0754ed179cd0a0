"""Slow, dense forms of the formulas, as references."""

import torch
from torch import Tensor


def dense_dechunk(features: Tensor, probability: Tensor, keep: Tensor, grid: tuple[int, ...], sigma: float) -> Tensor:
    """Compute the published formula sample by sample over all pairs."""
    axes = torch.meshgrid(*(torch.arange(size, dtype=features.dtype) for size in grid), indexing="ij")
    place = torch.stack(axes, -1).reshape(keep.shape[1], -1)
    out, start = [], 0
    for b in range(len(keep)):
        index = keep[b].nonzero()[:, 0]
        h = features[start : start + len(index)]
        start += len(index)
        p = probability[b, index].clamp(1e-4, 1 - 1e-4).to(h)
        weight = torch.exp(-_squares(place[index], place[index]) / (2 * sigma**2)) * p
        smooth = (weight / (weight.sum(1, keepdim=True) + 1e-8)) @ h
        mixed = p[:, None] * h + (1 - p[:, None]) * smooth
        out.append(mixed[_squares(place, place[index]).argmin(1)])
    return torch.stack(out)


def _squares(a: Tensor, b: Tensor) -> Tensor:
    return ((a[:, None] - b[None]) ** 2).sum(-1)
