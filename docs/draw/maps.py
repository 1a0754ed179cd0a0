"""Draw the tokens that a trained router keeps beside the true detail of the images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tokdyn.data import detail_score
from tokdyn.data.shapes import ShapesDataset
from tokdyn.sample import load_model
from tokdyn.seeds import noise_generator

_IMAGES = (50_003, 50_004, 50_006, 50_005)  # a star, a ring, a heart and a cross outside of the training set
_LEVEL, _DROP = 0.3, 0.6
_DIM = 0.25  # share of its contrast that a cell without detail, or dropped, keeps


def keep_map(folder: Path, run: Path) -> Path:
    """Draw noisy images, the cells with true detail and the cells that the router of a run keeps at two budgets.

    Args:
        folder: where `keep-map.png` is written.
        run: training run of a DC-DiT on procedural shapes.
    """
    model, objective, _ = load_model(run)
    data = ShapesDataset((32, 32))
    images, labels = data.batch(_IMAGES)
    steps = torch.arange(objective.num_train_timesteps)
    nearest = steps[(objective.level(steps) - _LEVEL).abs().argmin()]
    noised = objective.mix(images, torch.randn(images.shape, generator=noise_generator(0)), nearest.expand(len(images)))
    masks = data.detail_masks(_IMAGES)
    keeps, scores = [], []
    for drop in (0.0, _DROP):
        with torch.inference_mode():
            routing = model(noised.x_t, timestep=noised.timestep, class_labels=labels, tail_drop=drop).routing
        keeps.append(routing.keep.view(-1, *routing.grid))
        scores.append(detail_score(routing.keep, tuple(routing.grid), masks))
        share = f"{scores[-1].kept:.1%} of the cells, which hold {scores[-1].recall:.1%} of the detail"
        print(f"tail drop {drop:g}: keeps {share}, {scores[-1].lift:.2f} of a random choice")
    truth = torch.nn.functional.adaptive_max_pool2d(masks.float(), keeps[0].shape[1:]).bool()
    rows = (
        (f"what the router sees,\nat noise level {_LEVEL:g}", noised.x_t, None),
        (f"the truth: {truth.float().mean():.0%} of the cells\nhold the shape", images, truth),
        (f"what the router keeps:\n{scores[0].kept:.0%} of the cells", images, keeps[0]),
        (f"at tail drop {_DROP:g}:\n{scores[1].kept:.0%} of the cells", images, keeps[1]),
    )
    figure = Figure(figsize=(6.4, 5.6), dpi=120, facecolor="white", layout="constrained")
    axes = figure.subplots(len(rows), len(_IMAGES))
    for row, (name, pictures, kept) in enumerate(rows):
        for column in range(len(_IMAGES)):
            pixels = pictures[column].add(1).div(2).clamp(0, 1).permute(1, 2, 0).numpy()
            _show(axes[row, column], pixels, None if kept is None else kept[column].numpy())
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=10, labelpad=8)
    path = folder / "keep-map.png"
    figure.savefig(path)
    return path


def _show(axes: Axes, pixels: NDArray[np.float32], kept: NDArray[np.bool_] | None) -> None:
    """Draw an image; cells that are not kept fade to grey, and a line runs around those that are."""
    side = 1 if kept is None else len(pixels) // len(kept)
    large = pixels.repeat(8, 0).repeat(8, 1)
    if kept is not None:
        mask = kept.repeat(8 * side, 0).repeat(8 * side, 1)
        large = np.where(mask[..., None], large, 0.5 + _DIM * (large.mean(-1, keepdims=True) - 0.5))
        for colour, width in (("white", 2.6), ("black", 1.2)):  # seen on bright and on dark cells
            lines = LineCollection(_outline(kept, 8 * side), colors=colour, linewidths=width, capstyle="projecting")
            axes.add_collection(lines)
    axes.imshow(large, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _outline(kept: NDArray[np.bool_], side: int) -> list[list[tuple[float, float]]]:
    """Return the line segments between kept and other cells, in pixels (x, y)."""
    segments = []
    for axis in (0, 1):
        for row, column in np.argwhere(np.diff(kept.astype(int), axis=axis) != 0):
            top, left = (row + 1 - axis) * side - 0.5, (column + axis) * side - 0.5
            segments.append([(left, top), (left + side * (1 - axis), top + side * axis)])
    return segments
