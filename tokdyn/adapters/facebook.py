"""Adapters of the public DiT layout, `block(x, c)`: DiT, fast-DiT, SiT, and tokdyn's own DiT and DC-DiT."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Blocks, ModelAdapter
from tokdyn.adapters.readers import patch_grid, timestep_level
from tokdyn.adapters.width import SlicedLayer, Width, mlp_layers
from tokdyn.tokens import Grid


def _grid(model: nn.Module, call: Arguments) -> Grid:
    latents = next(value for value in call.values() if isinstance(value, Tensor) and value.dim() == 4)
    weight: Tensor = model.x_embedder.proj.weight  # type: ignore[union-attr, assignment]
    return latents.shape[-2] // weight.shape[-2], latents.shape[-1] // weight.shape[-1]


def _time(call: Arguments) -> Tensor | float:
    value: Tensor | float = next(call[name] for name in ("timestep", "t", "timesteps") if name in call)
    return value


def _level(model: nn.Module, call: Arguments) -> Tensor | float:
    """Return the noise level of a DiT: the timestep over 1000."""
    return _time(call) / 1000.0


def _sit_level(model: nn.Module, call: Arguments) -> Tensor | float:
    """Return the noise level of a SiT, whose time is 1 at the image in the public code, and 1 at noise in REPA's."""
    return 1.0 - _time(call)


def _fits(model: nn.Module) -> bool:
    return all(hasattr(model, name) for name in ("x_embedder", "t_embedder", "blocks", "final_layer"))


def _width(model: nn.Module) -> int:
    weight: Tensor = model.x_embedder.proj.weight  # type: ignore[union-attr, assignment]
    return len(weight)


def _heads(model: nn.Module) -> int:
    blocks: Any = model.blocks
    attention = blocks[0].attn
    return int(getattr(attention, "num_heads", None) or attention.heads)


def _sliceable(block: nn.Module) -> bool:
    """Tell whether the attention of a block uses the numbers of heads and channels that are stored in its module.

    tokdyn's attention does, and so does timm's in recent versions; others take the number of channels from their input,
    which keeps its full width. Attention of timm with a gate, or with a norm before the output projection, cannot be
    sliced, because both span all heads.
    """
    from tokdyn.models.blocks import Attention

    attention: Any = block.attn
    if isinstance(attention, Attention):
        return True
    plain = getattr(attention, "gate", None) is None and isinstance(getattr(attention, "norm", None), nn.Identity)
    return plain and {"num_heads", "head_dim", "attn_dim"} <= set(vars(attention))


WIDTH = Width(
    layers=(
        SlicedLayer("attn.qkv", out=("heads",)),
        SlicedLayer("attn.proj", into=("heads",)),
        *mlp_layers("mlp.fc2", "mlp.fc1"),
    ),
    inner="attn.proj.in_features",
    hidden="mlp.fc2.in_features",
    attention=("attn",),
    counts=("heads", "num_heads"),
    inners=("attn_dim",),
    sliceable=_sliceable,
)

FACEBOOK = ModelAdapter(
    name="DiT (public layout)",
    classes=("DiT",),
    blocks=(
        Blocks(
            "blocks",
            tokens="x",
            attention=("attn",),
            mlp=("mlp",),
            stream="stream",
            modulated=modulation.public_dit,
            width=WIDTH,
        ),
    ),
    grid=_grid,
    level=_level,
    refuse={},
    width=_width,
    heads=_heads,
    guidance="cond_first",
    fits=_fits,
)

SIT = replace(FACEBOOK, name="SiT (public layout)", classes=("SiT",), level=_sit_level, clock="assumed")

DC_DIT = ModelAdapter(
    name="DC-DiT",
    classes=("DCDiT",),
    blocks=(
        Blocks(
            "blocks", tokens="x", packing="packing", attention=("attn",), mlp=("mlp",), stream="stream", width=WIDTH
        ),
    ),
    grid=patch_grid,
    level=timestep_level(),
    refuse={},
    width=lambda model: int(model.config["hidden_size"]),  # type: ignore[index]
    heads=_heads,
    guidance="cond_first",
    chunked=True,
)
