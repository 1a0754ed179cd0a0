"""Functions and texts that the adapters of several families use: readers of the token grid and of the noise level.

`CONTROL_REASON` and `IMAGE_PROMPT_REASON` are reasons for `ModelAdapter.refuse`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import Arguments
from tokdyn.tokens import Grid

CONTROL_REASON = (
    "its residuals have one entry per cell and are added where tokens may be missing; leave the control out"
)
IMAGE_PROMPT_REASON = "image prompts and other attention arguments may have one entry per cell; leave them out"


def patch_grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of latents (B, C, rows, columns): both sizes divided by the patch size in the model's config."""
    size = model.config["patch_size"]  # type: ignore[index]
    rows, columns = call["hidden_states"].shape[-2:]
    return rows // size, columns // size


def video_grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of latents (B, C, frames, rows, columns): each size divided by that of a patch.

    The patch size in the model's config is one number for rows and columns, with that for frames in `patch_size_t`, or
    one number for each axis.
    """
    config: Any = model.config
    size = config["patch_size"]
    patch = (config.get("patch_size_t") or 1, size, size) if isinstance(size, int) else size
    return tuple(length // part for length, part in zip(call["hidden_states"].shape[-3:], patch, strict=True))


def channels_last_grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of latents (B, frames, rows, columns, C): each size divided by that of a patch."""
    patch = model.config["patch_size"]  # type: ignore[index]
    return tuple(length // part for length, part in zip(call["hidden_states"].shape[1:4], patch, strict=True))


def frame_level(scale: float = 1000.0) -> Callable[[nn.Module, Arguments], Tensor]:
    """Return a function for `ModelAdapter.level`, for models in which frames or tokens may differ in their timestep.

    The level of a sample is that of its noisiest token. The timestep runs from 0, the image, to `scale`, noise.
    """

    def level(model: nn.Module, call: Arguments) -> Tensor:
        value: Tensor = call["timestep"].float() / scale
        return value.flatten(1).amax(dim=1) if value.dim() > 1 else value

    return level


def timestep_level(
    name: str = "timestep", scale: float = 1000.0, backwards: bool = False
) -> Callable[[nn.Module, Arguments], Any]:
    """Return a function for `ModelAdapter.level`, for models whose timestep runs from 0, the image, to `scale`, noise.

    Args:
        name: the name of the timestep argument.
        scale: the timestep of pure noise.
        backwards: whether the timestep runs the other way, from 0, pure noise, to `scale`, the image.
    """

    def level(model: nn.Module, call: Arguments) -> Tensor | float:
        value = call[name]
        part = (value.float() if isinstance(value, torch.Tensor) else float(value)) / scale
        return 1.0 - part if backwards else part

    return level


def grid_from_ids(ids: Tensor) -> Grid:
    """Return the grid that position ids span: (frames, rows, columns), or (rows, columns) for a single frame.

    Reading the ids synchronises with their device. A compiled graph is made for one grid and asserts it.

    Args:
        ids: (N, axes) ids of all cells in raster order; the first three axes are frame, row and column.
    """
    grid: Grid = _constant_extent(ids)
    if torch.compiler.is_compiling():  # within a larger graph, which was compiled for this grid
        same = (_extent(ids) == torch.tensor(grid, device=ids.device)).all()
        torch._assert_async(same, "this graph was compiled for another token grid; compile the model alone instead.")
    return grid[1:] if grid[0] == 1 else grid


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_extent(ids: Tensor) -> Grid:
    return tuple(int(size) for size in _extent(ids).tolist())


def _extent(ids: Tensor) -> Tensor:
    """Return the (3,) numbers of frames, rows and columns that the ids span."""
    return ids[:, :3].amax(0) - ids[:, :3].amin(0) + 1
