"""Sana: linear attention, and a convolution over neighbouring cells in the MLP of every block."""

from __future__ import annotations

from tokdyn.adapters import modulation
from tokdyn.adapters.base import ModelAdapter, Stack
from tokdyn.adapters.latents import CONTROL, IP_ADAPTER, patches, timestep
from tokdyn.adapters.products import Products
from tokdyn.adapters.width import Width, processed, projections

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
