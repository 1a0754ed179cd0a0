"""Give the drawings a procedural picture, its cells and its true detail."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from tokdyn.data.shapes import ShapesDataset

Floats = NDArray[np.float64]


@lru_cache(maxsize=1)
def data() -> ShapesDataset:
    """Return the procedural shapes of 32 x 32 pixels."""
    return ShapesDataset((32, 32))


def picture(index: int) -> Floats:
    """Return image `index` as (32, 32, 3) between 0 and 1."""
    image = data().batch([index])[0][0]
    values: Floats = image.permute(1, 2, 0).add(1).div(2).numpy().astype(np.float64)
    return values


def colours(image: Floats, cells: int) -> list[list[str]]:
    """Return the mean colours of cells x cells squares of an image (H, W, 3), as they are written in SVG."""
    side = len(image) // cells
    mean = image.reshape(cells, side, cells, side, 3).mean((1, 3)).clip(0, 1)
    return [["#" + "".join(f"{round(255 * value):02x}" for value in cell) for cell in row] for row in mean]


def ranked_by_detail(index: int, cells: int) -> NDArray[np.int64]:
    """Return the rank of each cell of an image, 0 first, by its share of true detail; ties in a fixed random order."""
    mask = data().detail_masks([index])[:, None].float()
    detail = F.adaptive_avg_pool2d(mask, cells)[0, 0].numpy().astype(np.float64)
    detail += 1e-3 * np.random.default_rng(index).uniform(size=detail.shape)
    order = np.argsort(-detail, axis=None)
    rank = np.empty(order.size, np.int64)
    rank[order] = np.arange(order.size)
    return rank.reshape(detail.shape)
