"""Adapters of diffusers models whose blocks hold image tokens only: DiT, PixArt and Sana.

PixArt and Sana read the text by cross-attention. The attention of Sana is linear, and its MLP has a convolution over
neighbouring cells, so that tokens can be merged around its attention but not left out of a block.
"""

from __future__ import annotations

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.readers import CONTROL_REASON, IMAGE_PROMPT_REASON, patch_grid, timestep_level
from tokdyn.adapters.width import Width, attention_and_mlp, attention_layers, runs_processor

_WIDTH = attention_and_mlp("attn1", "ff", "AttnProcessor2_0")

DIT = ModelAdapter(
    name="DiT",
    classes=("DiTTransformer2DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.diffusers_dit,
            width=_WIDTH,
        ),
    ),
    grid=patch_grid,
    level=timestep_level(),
    refuse={},
    guidance="cond_first",
)

PIXART = ModelAdapter(
    name="PixArt",
    classes=("PixArtTransformer2DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            attention=("attn1",),
            mlp=("ff",),
            follow=(Follow("attention_mask", axis=2),),
            modulated=modulation.shift_table,
            products=Products(cross=("attn2",)),
            width=_WIDTH,
        ),
    ),
    grid=patch_grid,
    level=timestep_level(),
    refuse={},
)

SANA = ModelAdapter(
    name="Sana",
    classes=("SanaTransformer2DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.shift_table,
            products=Products(cross=("attn2",), linear="padded"),
            width=Width(
                layers=attention_layers("attn1"),
                inner="attn1.to_out.0.in_features",
                hidden=None,  # the channels of its MLP go through convolutions
                attention=("attn1",),
                sliceable=runs_processor("attn1", "SanaLinearAttnProcessor2_0"),
            ),
        ),
    ),
    grid=patch_grid,
    level=timestep_level(),
    refuse={"controlnet_block_samples": CONTROL_REASON, "attention_kwargs": IMAGE_PROMPT_REASON},
    dense=True,
    softmax=False,
)
