"""Adapters of diffusers' video models whose text and video streams meet in attention.

These are HunyuanVideo 1.5, Mochi, EasyAnimate and ConsisID.
"""

from __future__ import annotations

from dataclasses import replace

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.readers import IMAGE_PROMPT_REASON, timestep_level, video_grid
from tokdyn.adapters.video import COGVIDEOX
from tokdyn.adapters.width import attention_and_mlp

HUNYUAN15 = ModelAdapter(
    name="HunyuanVideo 1.5",
    classes=("HunyuanVideo15Transformer3DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("tokens", "text"),
            joint="first",
            follow=(Follow("freqs_cis", axis=0, batched=False), Follow("image_rotary_emb", axis=0, batched=False)),
            attention=("attn",),
            mlp=("ff",),
            modulated=modulation.from_embedding,
            width=attention_and_mlp("attn", "ff", "HunyuanVideo15AttnProcessor2_0"),
        ),
    ),
    grid=video_grid,
    level=timestep_level(),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    guidance="calls",
)

MOCHI = ModelAdapter(
    name="Mochi",
    classes=("MochiTransformer3DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("tokens", "text"),
            joint="first",
            follow=(Follow("image_rotary_emb", axis=0, batched=False),),
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.from_embedding,
            width=attention_and_mlp("attn1", "ff", "MochiAttnProcessor2_0"),
        ),
    ),
    grid=video_grid,
    level=timestep_level(backwards=True),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
)

EASYANIMATE = ModelAdapter(
    name="EasyAnimate",
    classes=("EasyAnimateTransformer3DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("tokens", "text"),
            follow=(Follow("image_rotary_emb", axis=0, batched=False),),
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.cogvideox,
            products=Products(text=(*Products().text, "txt_ff.*")),
            width=attention_and_mlp("attn1", "ff", "EasyAnimateAttnProcessor2_0"),
        ),
    ),
    grid=video_grid,
    level=timestep_level(),
    fits=lambda model: model.config["mmdit_layers"] >= model.config["num_layers"],  # type: ignore[index]
)

EASYANIMATE_SHARED = replace(
    EASYANIMATE,
    name="EasyAnimate with shared layers",
    # the last blocks call one MLP on the video tokens and then on the text tokens
    blocks=(replace(EASYANIMATE.blocks[0], mlp=(), products=None),),
    fits=None,
)

CONSISID = replace(
    COGVIDEOX,
    name="ConsisID",
    classes=("ConsisIDTransformer3DModel",),
    blocks=(replace(COGVIDEOX.blocks[0], full_between=True),),  # features of the face are added between blocks
)
