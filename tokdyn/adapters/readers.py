"""Read the token grid and the noise level from a call, in the ways that several families share.

The reasons for refusing an argument that several families have are here as well.
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
    """Return the grid of the patches of (B, C, H, W) latents, with the patch size of the model's configuration."""
    size = model.config["patch_size"]  # type: ignore[index]
    rows, columns = call["hidden_states"].shape[-2:]
    return rows // size, columns // size


def timestep_level(
    name: str = "timestep", scale: float = 1000.0, backwards: bool = False
) -> Callable[[nn.Module, Arguments], Any]:
    """Return a reader of the noise level for a model whose timestep runs from 0, the image, to `scale`.

    Args:
        name: of the timestep argument.
        scale: the timestep of pure noise.
        backwards: the timestep runs the other way, so that `scale` is the image.
    """

    def level(model: nn.Module, call: Arguments) -> Tensor | float:
        value = call[name]
        part = (value.float() if isinstance(value, torch.Tensor) else float(value)) / scale
        return 1.0 - part if backwards else part

    return level


def grid_from_ids(ids: Tensor) -> Grid:
    """Return the grid of position ids (N, axes), in raster order, whose first three axes are frame, row and column.

    A grid of a single frame is returned without the frame axis.
    """
    grid: Grid = _constant_extent(ids)
    if torch.compiler.is_compiling():  # within a larger graph, which was compiled for this grid
        same = (_extent(ids) == torch.tensor(grid, device=ids.device)).all()
        torch._assert_async(same, "this graph was made for another token grid; compile the model on its own instead.")
    return grid[1:] if grid[0] == 1 else grid


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _constant_extent(ids: Tensor) -> Grid:
    return tuple(int(size) for size in _extent(ids).tolist())


def _extent(ids: Tensor) -> Tensor:
    """Return the (3,) numbers of frames, rows and columns that the ids span."""
    return ids[:, :3].amax(0) - ids[:, :3].amin(0) + 1
