"""The adapter of Wan Animate 2, whose blocks read keys and values that an earlier call stored.

That call encodes the driving video (`kv_cache_mode="extract"`) and is made without methods. In the calls that denoise,
attention finds the tokens by their places, so that none may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tokdyn.adapters.arrangement import Arrangement
from tokdyn.adapters.base import Arguments, Blocks, ModelAdapter
from tokdyn.adapters.readers import timestep_level
from tokdyn.adapters.width import Kind, SlicedLayer, Width, mlp_layers, runs_processor
from tokdyn.lazy import Lazy
from tokdyn.tokens import Grid, ImageTokens

_CACHE = "kv_cache"
_WITHOUT = 9  # index of the block that the unconditional branch leaves out


@dataclass(frozen=True)
class Stored:
    """Keys and values (B, S, H, d) of the driving video, in the place of the model's own cache."""

    key: Tensor
    value: Tensor

    def get(self) -> tuple[Tensor, Tensor]:
        """Return keys and values."""
        return self.key, self.value


def _opened(named: Mapping[str, Any], images: Lazy[ImageTokens]) -> dict[str, Any]:
    """Replace the cache of a block by its keys and values (B, S, H d), of which samples and heads can be selected."""
    cache = named.get(_CACHE)
    if cache is None or cache.key is None:  # the model says that it is empty
        return dict(named)
    return {**named, _CACHE: (cache.key.flatten(2), cache.value.flatten(2))}


def _closed(named: Mapping[str, Any], images: Lazy[ImageTokens]) -> dict[str, Any]:
    if not isinstance(named.get(_CACHE), tuple):
        return dict(named)
    head = 2 * named["rotary_emb"].shape[-1]  # complex angles
    return {**named, _CACHE: Stored(*(each.unflatten(2, (-1, head)) for each in named[_CACHE]))}


def _grid(model: nn.Module, call: Arguments) -> Grid:
    patch = model.config["patch_size"]  # type: ignore[index]
    return tuple(length // part for length, part in zip(call["hidden_states"][0].shape[-3:], patch, strict=True))


def _modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block."""
    x = arguments["hidden_states"]
    shift, scale = (block.modulation + arguments["temb"]).chunk(6, dim=1)[:2]  # each (B, 1, D)
    out: Tensor = block.norm1(x.float()) * (1 + scale) + shift  # type: ignore[operator]
    return out.type_as(x)


_HEADS: tuple[Kind, ...] = ("heads",)

WAN_ANIMATE2 = ModelAdapter(
    name="Wan Animate 2",
    classes=("WanAnimate2Transformer3DModel",),
    blocks=(
        Blocks(
            "blocks",
            arrangement=Arrangement(_opened, _closed),
            attention=(),  # it finds tokens by their places
            mlp=("ffn",),
            modulated=_modulated,
            products=None,  # its attention is padded to squares of 128 x 128
            width=Width(
                layers=(
                    SlicedLayer("self_attn.to_q", out=_HEADS, norm="self_attn.norm_q"),
                    SlicedLayer("self_attn.to_k", out=_HEADS, norm="self_attn.norm_k"),
                    SlicedLayer("self_attn.to_v", out=_HEADS),
                    SlicedLayer("self_attn.to_out.0", into=_HEADS),
                    *mlp_layers("ffn.2", "ffn.0"),
                ),
                inner="self_attn.to_out.0.in_features",
                hidden="ffn.2.in_features",
                attention=("self_attn",),
                tables=(_CACHE,),
                sliceable=runs_processor("self_attn", "WanAnimate2AttnProcessor"),
            ),
        ),
    ),
    grid=_grid,
    level=timestep_level(),
    plain=lambda call: call.get("kv_cache_mode") == "extract",
    left_out=lambda model, call: (_WITHOUT,) if call.get("is_uncondtion") else (),
    complete="attention finds tokens by their places, so that none may be missing; use TokenMerge(where='mlp'), "
    "DepthSkip, DynamicWidth or FeatureCache",
    width=lambda model: int(model.config["dim"]),  # type: ignore[index]
    heads=lambda model: int(model.config["num_heads"]),  # type: ignore[index]
    guidance="calls",
)
