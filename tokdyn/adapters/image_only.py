"""Models of diffusers whose positions are added at the embedding: DiT and PixArt."""

from __future__ import annotations

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Follow, ModelAdapter, Products, Stack
from tokdyn.adapters.readers import CONTROL, IP_ADAPTER, patches, timestep
from tokdyn.adapters.width import Width, attention_and_mlp, processed, projections

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

SANA = ModelAdapter(
    name="Sana",
    classes=("SanaTransformer2DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.shift_table,
            products=Products(cross=("attn2",), linear=True),
            width=Width(
                cuts=projections("attn1"),
                inner="attn1.to_out.0.in_features",
                hidden=None,  # channels of its MLP go through convolutions
                attention=("attn1",),
                known=processed("attn1", "SanaLinearAttnProcessor2_0"),
            ),
        ),
    ),
    grid=patches,
    level=timestep(),
    refuse={"controlnet_block_samples": CONTROL, "attention_kwargs": IP_ADAPTER},
    dense=True,
    softmax=False,
)
