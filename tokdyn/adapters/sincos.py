"""Models of diffusers whose positions are added at the embedding: DiT and PixArt."""

from __future__ import annotations

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Follow, ModelAdapter, Stack
from tokdyn.adapters.latents import patches, timestep
from tokdyn.adapters.products import Products
from tokdyn.adapters.width import attention_and_mlp

_WIDTH = attention_and_mlp("attn1", "ff", "AttnProcessor2_0")

DIT = ModelAdapter(
    name="DiT",
    classes=("DiTTransformer2DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.class_labels,
            width=_WIDTH,
        ),
    ),
    grid=patches,
    level=timestep(),
    refuse={},
    guidance="cond_first",
)

PIXART = ModelAdapter(
    name="PixArt",
    classes=("PixArtTransformer2DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            attention=("attn1",),
            mlp=("ff",),
            follow=(Follow("attention_mask", axis=2),),
            modulated=modulation.shift_table,
            products=Products(cross=("attn2",)),
            width=_WIDTH,
        ),
    ),
    grid=patches,
    level=timestep(),
    refuse={},
)
