"""Readers of grids and noise levels that several families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import Arguments
from tokdyn.tokens import Grid


def patches(model: nn.Module, call: Arguments) -> Grid:
    """The grid of (B, C, H, W) latents, cut into the patches of the model's configuration."""
    size = model.config["patch_size"]  # type: ignore[index]
    rows, columns = call["hidden_states"].shape[-2:]
    return rows // size, columns // size


def timestep(
    name: str = "timestep", scale: float = 1000.0, backwards: bool = False
) -> Callable[[nn.Module, Arguments], Any]:
    """The noise level of a timestep argument that runs from 0 to `scale`, or back."""

    def level(model: nn.Module, call: Arguments) -> Tensor | float:
        value = call[name]
        part = (value.float() if isinstance(value, torch.Tensor) else float(value)) / scale
        return 1.0 - part if backwards else part

    return level


CONTROL = "its residuals are one for each cell and are added where fewer tokens may be; leave the control out"
IP_ADAPTER = "image prompts and other attention arguments may hold an entry for each cell; leave them out"


def grid_of_ids(ids: Tensor) -> Grid:
    """(frames,) rows and columns of position ids (N, axes) that begin with frame, row and column, in raster order."""
    found: Grid = _known_extent(ids)
    if torch.compiler.is_compiling():  # in the middle of a larger graph, which was made for this grid
        same = (_extent(ids) == torch.tensor(found, device=ids.device)).all()
        torch._assert_async(same, "the graph was made for another token grid; let torch.compile have the model alone.")
    return found[1:] if found[0] == 1 else found


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _known_extent(ids: Tensor) -> Grid:
    return tuple(int(size) for size in _extent(ids).tolist())


def _extent(ids: Tensor) -> Tensor:
    """(3,) cells from the first to the last frame, row and column."""
    return ids[:, :3].amax(0) - ids[:, :3].amin(0) + 1
