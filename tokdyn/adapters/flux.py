"""Flux and the models built like it: Chroma and Flux 2."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Follow, ModelAdapter, Products, Stack
from tokdyn.adapters.readers import CONTROL, IP_ADAPTER, grid_of_ids, timestep
from tokdyn.adapters.width import Cut, Width, attention_and_mlp, attention_beside_mlp, mlp, processed, projections


def _flux_grid(model: nn.Module, call: Arguments) -> tuple[int, ...]:
    ids: Tensor = call["img_ids"]
    return grid_of_ids(ids[0] if ids.dim() == 3 else ids)


_ROTARY = (Follow("image_rotary_emb", axis=0, batched=False),)
_FLUX_PROCESSORS = ("FluxAttnProcessor", "OvisImageAttnProcessor", "LongCatImageAttnProcessor")
_FLUX_SINGLE = attention_beside_mlp("attn", *_FLUX_PROCESSORS, hiddens=("mlp_hidden_dim",))

FLUX = ModelAdapter(
    name="Flux",
    classes=("FluxTransformer2DModel", "OvisImageTransformer2DModel", "LongCatImageTransformer2DModel"),
    stacks=(
        Stack(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("text", "tokens"),
            follow=_ROTARY,
            attention=("attn",),
            mlp=("ff",),
            modulated=modulation.embedding,
            width=attention_and_mlp("attn", "ff", *_FLUX_PROCESSORS),
        ),
        Stack(
            "single_transformer_blocks",
            text="encoder_hidden_states",
            returns=("text", "tokens"),
            inside="last",
            inside_mlp="last",
            follow=_ROTARY,
            attention=("attn",),
            mlp=(),
            products=Products(joint=("proj_*",)),
            width=_FLUX_SINGLE,
        ),
    ),
    grid=_flux_grid,
    read_ahead=("img_ids",),
    level=timestep(scale=1.0),
    refuse={
        "controlnet_block_samples": CONTROL,
        "controlnet_single_block_samples": CONTROL,
        "joint_attention_kwargs": IP_ADAPTER,
    },
    guidance="calls",
)

_CHROMA_FOLLOW = (
    *_ROTARY,
    Follow("attention_mask", dims=2),  # what blocks get; attention gets it for every pair of tokens
    Follow("attention_mask", axis=2, dims=4),
    Follow("attention_mask", axis=3, dims=4),
)

CHROMA = ModelAdapter(
    name="Chroma",
    classes=("ChromaTransformer2DModel",),
    stacks=(
        replace(FLUX.stacks[0], follow=_CHROMA_FOLLOW, modulated=None),  # its modulation is of text and image
        Stack(
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
    level=timestep(scale=1.0),
    refuse=FLUX.refuse,
    guidance="calls",
)

_FLUX2_DOUBLE = Width(
    cuts=(*projections("attn"), *mlp("ff.linear_out", "ff.linear_in")),
    inner="attn.to_out.0.in_features",
    hidden="ff.linear_out.in_features",
    attention=("attn",),
    known=processed("attn", "Flux2AttnProcessor", "Flux2KVAttnProcessor"),
)
_FLUX2_SINGLE = Width(
    cuts=(
        Cut("attn.to_qkv_mlp_proj", out=("heads", "heads", "heads", "channels", "channels")),
        Cut("attn.to_out", into=("heads", "channels")),
    ),
    inner="attn.inner_dim",
    hidden="attn.mlp_hidden_dim",
    attention=("attn",),
    hiddens=("mlp_hidden_dim",),
    known=processed("attn", "Flux2ParallelSelfAttnProcessor", "Flux2KVParallelSelfAttnProcessor"),
)

FLUX2 = ModelAdapter(
    name="Flux 2",
    classes=("Flux2Transformer2DModel",),
    stacks=(
        replace(FLUX.stacks[0], modulated=modulation.of_the_model, width=_FLUX2_DOUBLE),
        Stack(
            "single_transformer_blocks",
            image="last",
            follow=_ROTARY,
            attention=("attn",),
            mlp=(),
            width=_FLUX2_SINGLE,
        ),
    ),
    grid=_flux_grid,
    read_ahead=("img_ids",),
    level=timestep(scale=1.0),
    refuse={
        "kv_cache": "keys and values of earlier calls are there for every cell; leave the cache out",
        "joint_attention_kwargs": IP_ADAPTER,
    },
    guidance="calls",
)
