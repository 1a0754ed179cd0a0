"""Adapters of Flux, and of Chroma and Flux 2, which are built like it.

In the first list of blocks, text and image tokens are two sequences. In the second list they are one: Flux joins them
inside of each block and separates them again, Chroma and Flux 2 keep them joined from block to block.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.readers import CONTROL_REASON, IMAGE_PROMPT_REASON, grid_from_ids, timestep_level
from tokdyn.adapters.width import (
    SlicedLayer,
    Width,
    attention_and_mlp,
    attention_beside_mlp,
    attention_layers,
    mlp_layers,
    runs_processor,
)
from tokdyn.tokens import Grid, ImageTokens


def _flux_grid(model: nn.Module, call: Arguments) -> Grid | ImageTokens:
    return grid_from_ids(call["img_ids"])


_ROTARY = (Follow("image_rotary_emb", axis=0, batched=False),)
_FOLLOW = (
    *_ROTARY,
    *(Follow("joint_attention_kwargs", axis=axis, dims=4) for axis in (2, 3)),  # of the blocks: a mask in it
    *(Follow("attention_mask", axis=axis, dims=4) for axis in (2, 3)),  # of attention, which gets what is in it
)
_FLUX_PROCESSORS = ("FluxAttnProcessor", "OvisImageAttnProcessor", "LongCatImageAttnProcessor")
_FLUX_SINGLE = attention_beside_mlp("attn", *_FLUX_PROCESSORS, hiddens=("mlp_hidden_dim",))

FLUX = ModelAdapter(
    name="Flux",
    classes=("FluxTransformer2DModel", "OvisImageTransformer2DModel", "LongCatImageTransformer2DModel"),
    blocks=(
        Blocks(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("text", "tokens"),
            follow=_FOLLOW,
            attention=("attn",),
            mlp=("ff",),
            modulated=modulation.from_embedding,
            width=attention_and_mlp("attn", "ff", *_FLUX_PROCESSORS),
        ),
        Blocks(
            "single_transformer_blocks",
            text="encoder_hidden_states",
            returns=("text", "tokens"),
            inside="last",
            inside_mlp="last",
            follow=_FOLLOW,
            attention=("attn",),
            mlp=(),
            products=Products(joint=("proj_*",)),
            width=_FLUX_SINGLE,
        ),
    ),
    grid=_flux_grid,
    read_ahead=("img_ids",),
    level=timestep_level(scale=1.0),
    refuse={
        "controlnet_block_samples": CONTROL_REASON,
        "controlnet_single_block_samples": CONTROL_REASON,
        "joint_attention_kwargs": IMAGE_PROMPT_REASON,
    },
    guidance="calls",
)

_CHROMA_FOLLOW = (
    *_ROTARY,
    Follow("attention_mask", dims=2),  # of the blocks; attention gets one entry per pair of tokens
    Follow("attention_mask", axis=2, dims=4),
    Follow("attention_mask", axis=3, dims=4),
)

CHROMA = ModelAdapter(
    name="Chroma",
    classes=("ChromaTransformer2DModel",),
    blocks=(
        replace(FLUX.blocks[0], follow=_CHROMA_FOLLOW, modulated=None),  # it modulates text and image together
        Blocks(
            "single_transformer_blocks",
            image="last",
            follow=_CHROMA_FOLLOW,
            attention=("attn",),
            mlp=(),
            width=_FLUX_SINGLE,
        ),
    ),
    grid=_flux_grid,
    read_ahead=FLUX.read_ahead,
    level=timestep_level(scale=1.0),
    refuse=FLUX.refuse,
    guidance="calls",
)

_KV_CACHE_REASON = (
    "blocks store keys and values of reference images in one call and read them in later ones, for all samples "
    "together; leave the cache out, as Flux2KleinPipeline does"
)
_FLUX2_DOUBLE = Width(
    layers=(*attention_layers("attn"), *mlp_layers("ff.linear_out", "ff.linear_in")),
    inner="attn.to_out.0.in_features",
    hidden="ff.linear_out.in_features",
    attention=("attn",),
    sliceable=runs_processor("attn", "Flux2AttnProcessor", "Flux2KVAttnProcessor"),
)
_FLUX2_SINGLE = Width(
    layers=(
        SlicedLayer("attn.to_qkv_mlp_proj", out=("heads", "heads", "heads", "channels", "channels")),
        SlicedLayer("attn.to_out", into=("heads", "channels")),
    ),
    inner="attn.inner_dim",
    hidden="attn.mlp_hidden_dim",
    attention=("attn",),
    hiddens=("mlp_hidden_dim",),
    sliceable=runs_processor("attn", "Flux2ParallelSelfAttnProcessor", "Flux2KVParallelSelfAttnProcessor"),
)

FLUX2 = ModelAdapter(
    name="Flux 2",
    classes=("Flux2Transformer2DModel",),
    blocks=(
        replace(FLUX.blocks[0], modulated=modulation.flux2, width=_FLUX2_DOUBLE),
        Blocks(
            "single_transformer_blocks",
            image="last",
            follow=_FOLLOW,
            attention=("attn",),
            mlp=(),
            width=_FLUX2_SINGLE,
        ),
    ),
    grid=_flux_grid,
    read_ahead=("img_ids",),
    level=timestep_level(scale=1.0),
    refuse={"joint_attention_kwargs": IMAGE_PROMPT_REASON},
    refuse_always={"kv_cache": _KV_CACHE_REASON, "kv_cache_mode": _KV_CACHE_REASON},
    guidance="calls",
)
