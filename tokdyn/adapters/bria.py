"""Adapters of the models of Bria: Bria 3.2, Fibo and Fibo 2.

The first two are built like Flux. Before every block, Fibo replaces half of the channels of its text tokens by another
layer of its text encoder, and it joins them with the image tokens outside of its single-stream blocks. Fibo 2 is built
like Z-Image: a few tokens stand for the prompt ahead of the image tokens, and some blocks read the prompt as well.
"""

from __future__ import annotations

from dataclasses import replace

from tokdyn.adapters.base import Blocks
from tokdyn.adapters.flux import FLUX
from tokdyn.adapters.readers import (
    CONTROL_REASON,
    IMAGE_PROMPT_REASON,
    timestep_level,
)
from tokdyn.adapters.width import (
    attention_and_mlp,
    attention_beside_mlp,
)

_PROCESSORS = ("BriaAttnProcessor", "BriaFiboAttnProcessor")
_TWO_STREAMS = replace(FLUX.blocks[0], width=attention_and_mlp("attn", "ff", *_PROCESSORS))
_SINGLE = attention_beside_mlp("attn", *_PROCESSORS, hiddens=("mlp_hidden_dim",))

BRIA = replace(
    FLUX,
    name="Bria",
    classes=("BriaTransformer2DModel",),
    blocks=(_TWO_STREAMS, replace(FLUX.blocks[1], width=_SINGLE)),
    level=timestep_level(),
    refuse={
        "controlnet_block_samples": CONTROL_REASON,
        "controlnet_single_block_samples": CONTROL_REASON,
        "attention_kwargs": IMAGE_PROMPT_REASON,
    },
    guidance="uncond_first",
)

FIBO = replace(
    BRIA,
    name="Bria Fibo",
    classes=("BriaFiboTransformer2DModel",),
    blocks=(
        _TWO_STREAMS,
        Blocks(
            "single_transformer_blocks",
            image="last",
            follow=FLUX.blocks[1].follow,
            attention=("attn",),
            mlp=(),
            width=_SINGLE,
        ),
    ),
    refuse={"joint_attention_kwargs": IMAGE_PROMPT_REASON},
)
