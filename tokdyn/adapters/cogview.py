"""CogView of diffusers: text and image in streams of their own, in one attention."""

from __future__ import annotations

from tokdyn.adapters.base import Follow, ModelAdapter, Stack
from tokdyn.adapters.latents import IP_ADAPTER, patches, timestep
from tokdyn.adapters.products import Products
from tokdyn.adapters.width import attention_and_mlp

COGVIEW4 = ModelAdapter(
    name="CogView4",
    classes=("CogView4Transformer2DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("tokens", "text"),
            follow=(Follow("image_rotary_emb", axis=0, batched=False),),
            attention=("attn1",),
            mlp=(),  # one MLP is called on image and text in turn
            products=Products(joint=("ff.*",)),
            width=attention_and_mlp("attn1", "ff", "CogView4AttnProcessor"),
        ),
    ),
    grid=patches,
    level=timestep(),
    refuse={
        "attention_mask": "it has an entry for every pair of tokens; leave it out",
        "attention_kwargs": IP_ADAPTER,
    },
    guidance="calls",
)

COGVIEW3 = ModelAdapter(
    name="CogView3 Plus",
    classes=("CogView3PlusTransformer2DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("tokens", "text"),
            inside_mlp="last",
            attention=("attn1",),
            mlp=("ff",),
            products=Products(joint=("attn1.*",)),
            width=attention_and_mlp("attn1", "ff", "CogVideoXAttnProcessor2_0"),
        ),
    ),
    grid=patches,
    level=timestep(),
)
