"""The adapter of Latte, whose blocks attend in turn among the tokens of a frame and among those of a place.

The first list of blocks takes (B F, N, D), every frame as a sample, and the second (B N, F, D), every place. Methods
see (B, F N, D), frame after frame. Block i of the first list runs just before block i of the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from tokdyn.adapters import modulation
from tokdyn.adapters.arrangement import Arrangement
from tokdyn.adapters.base import Arguments, Blocks, ModelAdapter
from tokdyn.adapters.readers import timestep_level, video_grid
from tokdyn.adapters.width import attention_and_mlp
from tokdyn.lazy import Lazy
from tokdyn.tokens import Grid, ImageTokens

_TOKENS = "hidden_states"
_REPEATED = ("timestep", "encoder_hidden_states")  # arguments with equal entries for all frames or places of a sample


def _frames(grid: Grid) -> tuple[int, Grid]:
    return grid[0], grid[1:]


def _places(grid: Grid) -> tuple[int, Grid]:
    return grid[1] * grid[2], grid[:1]


def _from_frames(named: Mapping[str, Any], images: Lazy[ImageTokens]) -> dict[str, Any]:
    """Turn frames (B F, N, D) into samples (B, F N, D)."""
    frames, _ = _frames(images.value.grid)
    changed = _once(named, frames)
    changed[_TOKENS] = named[_TOKENS].unflatten(0, (-1, frames)).flatten(1, 2)
    return changed


def _to_frames(named: Mapping[str, Any], images: Lazy[ImageTokens]) -> dict[str, Any]:
    frames, _ = _frames(images.value.grid)
    changed = _for_each(named, frames)
    changed[_TOKENS] = named[_TOKENS].unflatten(1, (frames, -1)).flatten(0, 1)
    return changed


def _from_places(named: Mapping[str, Any], images: Lazy[ImageTokens]) -> dict[str, Any]:
    """Turn places (B N, F, D) into samples (B, F N, D)."""
    places, _ = _places(images.value.grid)
    changed = _once(named, places)
    changed[_TOKENS] = named[_TOKENS].unflatten(0, (-1, places)).transpose(1, 2).flatten(1, 2)
    return changed


def _to_places(named: Mapping[str, Any], images: Lazy[ImageTokens]) -> dict[str, Any]:
    places, _ = _places(images.value.grid)
    changed = _for_each(named, places)
    changed[_TOKENS] = named[_TOKENS].unflatten(1, (-1, places)).transpose(1, 2).flatten(0, 1)
    return changed


def _once(named: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """Take one entry for each sample from arguments that repeat it for all parts."""
    return {name: value[::parts] if name in _REPEATED and value is not None else value for name, value in named.items()}


def _for_each(named: Mapping[str, Any], parts: int) -> dict[str, Any]:
    """Repeat the entries of samples for all parts."""
    return {
        name: value.repeat_interleave(parts, dim=0) if name in _REPEATED and value is not None else value
        for name, value in named.items()
    }


def _without_time(model: nn.Module, call: Arguments) -> range:
    """Return the blocks across frames, all of which a call may switch off."""
    depth = int(model.config["num_layers"])  # type: ignore[index]
    return range(depth, 2 * depth) if call.get("enable_temporal_attentions") is False else range(0)


_IN_FRAMES = Blocks(
    "transformer_blocks",
    arrangement=Arrangement(_from_frames, _to_frames, _frames),
    attention=("attn1",),
    mlp=("ff",),
    modulated=modulation.shift_table,
    products=None,  # cross-attention runs over the text once for every frame
    width=attention_and_mlp("attn1", "ff", "AttnProcessor2_0"),
)

LATTE = ModelAdapter(
    name="Latte",
    classes=("LatteTransformer3DModel",),
    blocks=(
        _IN_FRAMES,
        replace(
            _IN_FRAMES,
            path="temporal_transformer_blocks",
            arrangement=Arrangement(_from_places, _to_places, _places),
            attention=(),  # among the few tokens of a place, where merging would mix frames
        ),
    ),
    grid=video_grid,
    level=timestep_level(),
    complete="its blocks attend in turn among the tokens of a frame and among those of a place in all frames, so that "
    "none may be missing between blocks; use TokenMerge, DepthSkip, DynamicWidth or FeatureCache",
    left_out=_without_time,
)
