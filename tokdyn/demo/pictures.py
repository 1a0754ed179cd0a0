"""Draw which tokens the router keeps, beside the true detail of the images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F

from tokdyn.data.shapes import ShapesDataset
from tokdyn.demo.router import route_noisy_shapes
from tokdyn.diffusion.objective import Objective
from tokdyn.report.grids import image_grid
from tokdyn.report.maps import shade
from tokdyn.report.pixels import to_pixels, write_png


def draw_router(
    model: Any,
    objective: Objective,
    data: ShapesDataset,
    indices: Sequence[int],
    levels: Sequence[float],
    path: Path,
    seed: int = 0,
) -> Path:
    """Draw some images in rows: the clean images without detail faded, then for each noise level without kept tokens.

    In the first row, tokens without true detail are faded. In each further row, which shows the noisy images, tokens
    that the router drops are.

    Args:
        model: a chunking model.
        objective: objective that the model was trained with.
        data: the shapes.
        indices: indices of the images.
        levels: noise levels in [0, 1].
        path: path of the PNG to write.
        seed: seed of the noise.

    Returns:
        `path`.
    """
    rows, titles = [], []
    for level in levels:
        routing, noised = route_noisy_shapes(model, objective, data, indices, level, seed)
        keep = routing.keep.cpu().view(-1, *routing.grid).numpy()
        rows += [shade(image, mask) for image, mask in zip(to_pixels(noised.x_t), keep, strict=True)]
        titles.append(f"kept at noise level {level:g}")
    images, _ = data.batch(indices)
    # A token has detail if any of its pixels has.
    truth = F.adaptive_max_pool2d(data.detail_masks(indices).float(), keep.shape[1:]).bool().numpy()
    rows[:0] = [shade(image, mask) for image, mask in zip(to_pixels(images), truth, strict=True)]
    page = image_grid(np.stack(rows), columns=len(indices), row_titles=["true detail", *titles])
    return write_png(page, path)
