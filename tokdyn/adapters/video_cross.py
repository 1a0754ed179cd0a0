"""Adapters of diffusers' video models with cross-attention to the text: Allegro, Cosmos, Kandinsky 5, Sana."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.products import CrossAttention
from tokdyn.adapters.readers import (
    CONTROL_REASON,
    IMAGE_PROMPT_REASON,
    channels_last_grid,
    frame_level,
    timestep_level,
    video_grid,
    with_given_frames,
)
from tokdyn.adapters.width import SlicedLayer, Width, attention_and_mlp, attention_layers, mlp_layers, runs_processor
from tokdyn.tokens import Grid, ImageTokens

ALLEGRO = ModelAdapter(
    name="Allegro",
    classes=("AllegroTransformer3DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            follow=(Follow("image_rotary_emb", item=1), Follow("attention_mask", axis=2, dims=3)),
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.shift_table_per_token,
            products=Products(cross=("attn2",)),
            width=attention_and_mlp("attn1", "ff", "AllegroAttnProcessor2_0"),
        ),
    ),
    grid=video_grid,
    level=timestep_level(),
)


def _cosmos_level(model: nn.Module, call: Arguments) -> Tensor:
    """Return the noise level `s / (1 + s)` for noise of standard deviation s.

    Models with learned positions (Cosmos 1) get `log(s) / 4` as the timestep, later ones the level itself, which may
    differ between frames: that of the noisiest one counts.
    """
    value: Tensor = call["timestep"].float()
    if value.dim() == 5:
        value = value.flatten(1).amax(dim=1)
    return torch.sigmoid(4 * value) if model.config["extra_pos_embed_type"] else value  # type: ignore[index]


def _cosmos_tokens(model: nn.Module, call: Arguments) -> Grid | ImageTokens:
    """Read the grid; `condition_mask` (B, 1, frames, rows, columns) is 1 in the frames that the model is given.

    With `input_frames_guidance=True` of the Cosmos 1 pipeline, it is 0 in unconditional calls, and nothing is found.
    """
    grid, mask = video_grid(model, call), call.get("condition_mask")
    if mask is None:
        return grid
    duration, rows, columns = model.config["patch_size"]  # type: ignore[index]
    return with_given_frames(grid, 1 - mask[:, 0, ::duration, ::rows, ::columns].flatten(1))


COSMOS = ModelAdapter(
    name="Cosmos",
    classes=("CosmosTransformer3DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            follow=(
                Follow("image_rotary_emb", axis=0, batched=False),
                Follow("extra_pos_emb"),
                Follow("embedded_timestep", dims=3),  # where frames have timesteps of their own
                Follow("temb", dims=3),
                Follow("controlnet_residual"),
            ),
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.cosmos,
            products=Products(
                cross=("attn2",),
                between=(CrossAttention("attn2", "image", "encoder_hidden_states.1"),),
                over={
                    "embedded_timestep": ("norm*",),  # frames may have timesteps of their own
                    "encoder_hidden_states.1": ("attn2.[kv]_img",),  # an image
                },
                needs={"encoder_hidden_states.1": ("attn2.q_img",)},
            ),
            width=attention_and_mlp("attn1", "ff", "CosmosAttnProcessor2_0"),
        ),
    ),
    grid=_cosmos_tokens,
    read_ahead=("condition_mask",),
    level=_cosmos_level,
    guidance="calls",
    fits=lambda model: bool(model.config["extra_pos_embed_type"]),  # type: ignore[index]
)

COSMOS2 = replace(COSMOS, name="Cosmos 2", fits=None)


def _kandinsky_heads(model: nn.Module) -> int:
    config: Any = model.config
    return int(config["model_dim"] // sum(config["axes_dims"]))


_KANDINSKY_WIDTH = Width(
    layers=(
        SlicedLayer("self_attention.to_query", out=("heads",), norm="self_attention.query_norm"),
        SlicedLayer("self_attention.to_key", out=("heads",), norm="self_attention.key_norm"),
        SlicedLayer("self_attention.to_value", out=("heads",)),
        SlicedLayer("self_attention.out_layer", into=("heads",)),
        *mlp_layers("feed_forward.out_layer", "feed_forward.in_layer"),
    ),
    inner="self_attention.out_layer.in_features",
    hidden="feed_forward.out_layer.in_features",
    attention=("self_attention",),
    counts=("num_heads",),
    sliceable=runs_processor("self_attention", "Kandinsky5AttnProcessor"),
)


def _kandinsky_tokens(model: nn.Module, call: Arguments) -> Grid | ImageTokens:
    """Read the grid; where latents hold conditions, their last channel is 1 in the frames that the model is given."""
    grid = channels_last_grid(model, call)
    if not model.config["visual_cond"]:  # type: ignore[index]
        return grid
    duration, rows, columns = model.config["patch_size"]  # type: ignore[index]
    return with_given_frames(grid, 1 - call["hidden_states"][:, ::duration, ::rows, ::columns, -1].flatten(1))


KANDINSKY5 = ModelAdapter(
    name="Kandinsky 5",
    classes=("Kandinsky5Transformer3DModel",),
    blocks=(
        Blocks(
            "visual_transformer_blocks",
            tokens="visual_embed",
            follow=(Follow("rope"), Follow("rotary_emb")),  # the names in blocks and in attention
            attention=("self_attention",),
            mlp=("feed_forward",),
            modulated=modulation.kandinsky,
            products=Products(
                sample=("visual_modulation.*",),
                cross=("cross_attention",),
                context="text_embed",
                mlp=("feed_forward.*",),
                indicator=("visual_modulation.*",),
            ),
            width=_KANDINSKY_WIDTH,
        ),
    ),
    grid=_kandinsky_tokens,
    read_ahead=("hidden_states",),
    level=timestep_level(),
    refuse={
        "sparse_params": "sparse attention works on squares of 8 x 8 cells, in which no cell may be missing; leave it "
        "out, or use DepthSkip or FeatureCache"
    },
    width=lambda model: int(model.config["model_dim"]),  # type: ignore[index]
    heads=_kandinsky_heads,
    guidance="calls",
)


def _sana_tokens(model: nn.Module, call: Arguments) -> Grid | ImageTokens:
    """Read the grid; a first frame that the model is given is clean and has timestep 0."""
    timestep: Tensor = call["timestep"]
    return with_given_frames(video_grid(model, call), timestep.flatten(1) if timestep.dim() > 1 else timestep)


SANA_VIDEO = ModelAdapter(
    name="Sana Video",
    classes=("SanaVideoTransformer3DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            follow=(Follow("rotary_emb"), Follow("timestep", dims=3)),
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.sana_video,
            products=Products(cross=("attn2",), linear="summed"),
            width=Width(
                layers=attention_layers("attn1"),
                inner="attn1.to_out.0.in_features",
                hidden=None,  # the channels of its MLP go through convolutions
                attention=("attn1",),
                sliceable=runs_processor("attn1", "SanaLinearAttnProcessor3_0"),
            ),
        ),
    ),
    grid=_sana_tokens,
    read_ahead=("timestep",),
    level=frame_level(),
    refuse={"controlnet_block_samples": CONTROL_REASON, "attention_kwargs": IMAGE_PROMPT_REASON},
    dense=True,
    softmax=False,
)

KANDINSKY6_SR = ModelAdapter(
    name="Kandinsky 6 SR",
    classes=("Kandinsky6SRTransformer3DModel",),
    blocks=(Blocks("visual_transformer_blocks", attention=(), mlp=(), products=None),),
    grid=channels_last_grid,
    level=timestep_level(),
    width=lambda model: int(model.config["model_dim"]),  # type: ignore[index]
    heads=_kandinsky_heads,
    dense=True,  # sparse attention works on squares of 8 x 8 cells, in which none may be missing
)

SANA_WM = ModelAdapter(
    name="Sana WM",
    classes=("SanaWMTransformer3DModel",),
    blocks=(Blocks("blocks", tokens="x", attention=(), mlp=(), products=None),),
    grid=video_grid,
    level=frame_level(),
    width=lambda model: int(model.config["hidden_size"]),  # type: ignore[index]
    dense=True,  # attention and MLP arrange tokens by frames, and run along them
    softmax=False,
)
