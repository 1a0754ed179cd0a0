"""Record and draw boundary maps, which show the tokens that a model kept in each step of a trajectory.

A cell is the square of an image that one token stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import repeat
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from tokdyn.diffusion.records import StepState
from tokdyn.errors import InputError
from tokdyn.report.pixels import Pixels
from tokdyn.report.style import INK, MUTED, figure_style, in_lines, save_figure, with_drawable_letters

_CELL = 8  # smallest width of a drawn cell in pixels
_MIX = 0.75  # share of the hatch in a dropped cell
_BRIGHT, _DARK = 150, 90  # grey levels of the hatch
_PERIOD, _STROKE = 6, 2  # distance and width of its bright lines in pixels, along a row
_TILE = 1.2  # width of a picture in inches
_LETTERS = 10  # of a line of a row's name
_WIDTH = 0.0097  # inches of such a letter, per point of its size

Background = Literal["prediction", "noisy"]


@dataclass(frozen=True)
class MapFrame:
    """One recorded step of n images.

    Attributes:
        index: index of the step, from 0.
        level: noise level in [0, 1].
        keep: (n, R, C) bool, True for tokens kept in the conditional branch.
        picture: (n, channels, H, W) images to draw: the predicted clean ones, or the noisy ones.
    """

    index: int
    level: float
    keep: Tensor
    picture: Tensor


@dataclass(frozen=True)
class Maps:
    """The tokens kept along a trajectory of n images.

    Attributes:
        frames: the recorded steps, in order.
        frequency: (n, R, C) float32, share of all steps in which each token was kept.
    """

    frames: tuple[MapFrame, ...]
    frequency: Tensor


class MapRecorder:
    """A callback for `tokdyn.diffusion.sampling.generate` that records which tokens were kept.

    The tensors stay on the device until `maps` is called, so that recording does not synchronise.

    Args:
        steps: number of steps of the trajectory.
        images: number of images to record, the first ones of the batch.
        frames: number of steps to record, spread evenly, the first and the last included.
        background: record the predicted clean images ("prediction") or the noisy images ("noisy") to draw on.
    """

    def __init__(self, steps: int, images: int = 4, frames: int = 6, background: Background = "prediction") -> None:
        shown = torch.linspace(0, steps - 1, min(frames, steps)).round().long().tolist()
        self._shown, self._images, self._background = set(shown), images, background
        self._frames: list[MapFrame] = []
        self._total: Tensor | None = None
        self._steps = 0

    def __call__(self, step: StepState) -> None:
        """Record one step; does nothing for a model that does not route tokens."""
        if step.routing is None:
            return
        keep = step.routing.keep[: min(self._images, len(step.x))].unflatten(1, step.routing.grid)
        self._total = keep.float() if self._total is None else self._total + keep
        self._steps += 1
        if step.index in self._shown:
            picture = step.x0() if self._background == "prediction" else step.x
            self._frames.append(MapFrame(step.index, step.level, keep.clone(), picture[: len(keep)].clone()))

    def maps(self) -> Maps:
        """Return what was recorded, on the CPU.

        Raises:
            InputError: nothing was recorded, because the model computes every token.
        """
        if self._total is None:
            raise InputError(
                "The model computes every token, so there are no maps to draw: set maps=false, or sample a DC-DiT."
            )
        frames = tuple(
            MapFrame(frame.index, frame.level, frame.keep.cpu(), frame.picture.cpu()) for frame in self._frames
        )
        return Maps(frames, self._total.cpu() / self._steps)


def shade(pixels: Pixels, keep: NDArray[np.bool_]) -> Pixels:
    """Hatch the dropped cells of an image in grey, and outline the kept ones.

    Hatch and outline do not depend on the image, so that kept and dropped cells can be told apart whether it is bright,
    dark or coloured. A kept cell shows the image itself. `page.js` draws the same in pages.

    Args:
        pixels: (H, W, 3) uint8.
        keep: (R, C) bool, True for kept cells.

    Returns:
        (H', W', 3) uint8, enlarged by a whole factor so that a cell is at least 8 pixels wide.
    """
    height, width = pixels.shape[:2]
    factor = max(1, -(-_CELL * keep.shape[0] // height), -(-_CELL * keep.shape[1] // width))
    image = repeat(pixels, "h w rgb -> (h rows) (w columns) rgb", rows=factor, columns=factor).astype(np.float32)
    rows = np.arange(len(image)) * keep.shape[0] // len(image)
    columns = np.arange(image.shape[1]) * keep.shape[1] // image.shape[1]
    kept = keep[np.ix_(rows, columns)]
    diagonal = np.add.outer(np.arange(len(image)), np.arange(image.shape[1])) % _PERIOD
    hatch = np.where(diagonal < _STROKE, _BRIGHT, _DARK)[..., None]
    image = np.where(kept[..., None], image, (1.0 - _MIX) * image + _MIX * hatch)
    edge = np.zeros_like(kept)
    across, down = kept[:, 1:] != kept[:, :-1], kept[1:] != kept[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    image[edge] = np.where(kept[edge], 255.0, 0.0)[:, None]
    shaded: Pixels = (image + 0.5).astype(np.uint8)
    return shaded


def draw_maps(
    maps: Maps,
    finals: Pixels,
    to_pixels: Callable[[Tensor], Pixels],
    path: Path,
    names: Sequence[str] | None = None,
    title: str = "Tokens kept over the trajectory",
    column: bool = False,
) -> Path:
    """Draw one row per image: the recorded steps with dropped cells hatched, the final image, and a heat map.

    The heat map shows the share of all steps in which each cell was kept.

    Args:
        maps: the result of a `MapRecorder`.
        finals: (n, H, W, 3) uint8 final images.
        to_pixels: converts the recorded pictures (n, channels, H, W), pixels or latents, to (n, H, W, 3) uint8.
        path: path of the file to write.
        names: n row titles.
        title: title of the figure.
        column: make the figure as wide as a column of a paper, without a title.

    Returns:
        `path`.
    """
    frequency, steps = maps.frequency.numpy(), len(maps.frames)
    count = len(frequency)
    points, proportion = 6.5 if column else 9.5, finals.shape[1] / finals.shape[2]
    tile = (3.1 - _LETTERS * _WIDTH * points) / (steps + 2.3) if column else _TILE
    titles = [in_lines(name, _LETTERS, tile * proportion + 0.1, points) for name in names or ()]
    beside = _WIDTH * points * max((len(line) for title in titles for line in title.split("\n")), default=0)  # inches
    tile = (3.1 - beside) / (steps + 2.3) if column else _TILE
    with figure_style(column):
        engine = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
        tall = tile * proportion
        figure = Figure(
            figsize=(tile * (steps + 2.3) + 0.4 + beside, (tall + 0.2) * count + (0.6 if column else 1.0)),
            layout=engine,
        )
        axes = figure.subplots(count, steps + 2, squeeze=False)
        for place, frame in enumerate(maps.frames):
            pictures, keeps = to_pixels(frame.picture), frame.keep.numpy()
            for row in range(count):
                _show(axes[row, place], shade(pictures[row], keeps[row]), f"{keeps[row].mean():.0%}")
            heading = f"noise\n{frame.level:.2f}" if place == 0 else f"{frame.level:.2f}"
            axes[0, place].set_title(heading, fontsize=points, fontweight="normal", loc="center", color=INK)
        for row in range(count):
            _show(axes[row, steps], finals[row], "")
            heat = axes[row, steps + 1].imshow(frequency[row], cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
            _bare(axes[row, steps + 1], f"{frequency[row].mean():.0%}")
            if titles:
                axes[row, 0].set_ylabel(
                    titles[row], fontsize=points, fontweight="bold", rotation=0, ha="right", va="center", color=INK,
                )  # fmt: skip
        for place, heading in ((steps, "final\nimage"), (steps + 1, "steps\nkept")):
            axes[0, place].set_title(heading, fontsize=points, fontweight="normal", loc="center", color=INK)
        bar = figure.colorbar(heat, ax=axes[:, -1].tolist(), fraction=0.09, pad=0.04, ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["0%", "50%", "100%"], fontsize="small")
        bar.outline.set_visible(False)
        if not column:
            figure.suptitle(with_drawable_letters(title), x=0.01, ha="left", fontsize="large", fontweight="bold")
        grey, bright = (f"#{level:02x}{level:02x}{level:02x}" for level in (_DARK, _BRIGHT))
        handles = [
            Patch(facecolor="white", edgecolor="black", label="kept: the image itself, outlined"),
            Patch(facecolor=grey, edgecolor=bright, hatch="////", label="dropped: grey, hatched"),
        ]
        figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize="small")
        return save_figure(figure, path)


def _show(axes: Axes, pixels: Pixels, caption: str) -> None:
    """Draw an image on the axes, with the caption below."""
    axes.imshow(pixels)  # interpolated only if the page makes it smaller
    _bare(axes, caption)


def _bare(axes: Axes, caption: str) -> None:
    """Remove ticks and frame of the axes, and write the caption below."""
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel(caption, fontsize="small", color=MUTED, labelpad=1.5)
