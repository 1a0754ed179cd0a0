"""Adapters of video models of diffusers: Wan, SkyReels, LTX-Video, HunyuanVideo and CogVideoX."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.readers import (
    IMAGE_PROMPT_REASON,
    grid_from_coordinates,
    timestep_level,
    video_grid,
    with_given_frames,
)
from tokdyn.adapters.width import attention_and_mlp, attention_beside_mlp
from tokdyn.errors import InputError
from tokdyn.tokens import Grid, ImageTokens, beside


def _wan_tokens(model: nn.Module, call: Arguments) -> Grid | ImageTokens:
    """Read the grid; the first frame of image to video (Wan 2.2 5B) is clean and has timestep 0."""
    return with_given_frames(video_grid(model, call), call["timestep"])


WAN = ModelAdapter(
    name="Wan",
    classes=("WanTransformer3DModel", "ChronoEditTransformer3DModel"),
    blocks=(
        Blocks(
            "blocks",
            follow=(Follow("rotary_emb"), Follow("temb", dims=4)),
            attention=("attn1",),
            mlp=("ffn",),
            modulated=modulation.shift_table_per_token,
            time_projection="temb",
            products=Products(cross=("attn2",), context_text=512),
            width=attention_and_mlp("attn1", "ffn", "WanAttnProcessor", "SkyReelsV2AttnProcessor"),
        ),
    ),
    grid=_wan_tokens,
    read_ahead=("timestep",),
    level=timestep_level(),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    guidance="calls",
)


def _needs_all_frames(model: nn.Module) -> str | None:
    """Return why a model whose attention is causal over frames needs all tokens; None for other models."""
    if model.config["num_frame_per_block"] == 1:  # type: ignore[index]
        return None
    return (
        "with this num_frame_per_block, frames attend to earlier frames only, by a mask with one entry per pair of "
        "cells; build the model with num_frame_per_block=1, or use DepthSkip or FeatureCache"
    )


SKYREELS = replace(
    WAN,
    name="SkyReels V2",
    classes=("SkyReelsV2Transformer3DModel",),
    blocks=(replace(WAN.blocks[0], follow=(Follow("rotary_emb"), Follow("temb", axis=2, dims=4))),),
    grid=video_grid,  # its frames may all have timesteps of their own
    read_ahead=(),
    whole=_needs_all_frames,
)


def _ltx_tokens(model: nn.Module, call: Arguments) -> Grid | ImageTokens:
    """Read the grid; frames that the video is conditioned on come before it, or have a lower timestep than others."""
    read: Grid | ImageTokens
    if call.get("video_coords") is None:
        read = call["num_frames"], call["height"], call["width"]
    else:
        read = grid_from_coordinates(call["video_coords"])
    level = call["timestep"]
    if isinstance(read, ImageTokens) and level.dim() == 2 and level.shape[1] > 1:
        level = level[:, beside(read)[0] :]
    return with_given_frames(read, level, strengths=True)


LTX = ModelAdapter(
    name="LTX-Video",
    classes=("LTXVideoTransformer3DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            follow=(Follow("image_rotary_emb"), Follow("temb", dims=3)),
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.shift_table_per_token,
            products=Products(cross=("attn2",)),
            width=attention_and_mlp("attn1", "ff", "LTXVideoAttnProcessor", tables=("image_rotary_emb",)),
        ),
    ),
    grid=_ltx_tokens,
    read_ahead=("timestep",),
    level=timestep_level(),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
)


def _hunyuan_tokens(model: nn.Module, call: Arguments) -> Grid | ImageTokens:
    """Read the grid; some models from an image are given the first frame, which blocks find by its place."""
    frames, *rest = grid = video_grid(model, call)
    if model.config["image_condition_type"] != "token_replace":  # type: ignore[index]
        return grid
    if frames == 1:
        raise InputError(
            "hidden_states holds one frame, the given one of a HunyuanVideoTransformer3DModel with "
            "image_condition_type='token_replace'; call it with the frames to generate as well."
        )
    return ImageTokens((frames - 1, *rest), references=((1, *rest),), leading=1)


_HUNYUAN_TWO_STREAM = Blocks(
    "transformer_blocks",
    text="encoder_hidden_states",
    returns=("tokens", "text"),
    joint="first",
    follow=(
        Follow("attention_mask", axis=3),
        Follow("freqs_cis", axis=0, batched=False),  # the name in two-stream blocks
        Follow("image_rotary_emb", axis=0, batched=False),  # the name in single-stream blocks
    ),
    attention=("attn",),
    mlp=("ff",),
    rounds=("temb", "token_replace_emb"),  # the first frame may have a timestep of its own
    modulated=modulation.from_embedding,
    products=Products(rounds=("norm1.*",)),
    width=attention_and_mlp("attn", "ff", "HunyuanVideoAttnProcessor2_0"),
)
_HUNYUAN_SINGLE_STREAM = replace(
    _HUNYUAN_TWO_STREAM,
    path="single_transformer_blocks",
    mlp=(),
    inside_mlp="first",
    modulated=None,
    products=Products(joint=("*",), rounds=("norm.*",)),
    width=attention_beside_mlp("attn", "HunyuanVideoAttnProcessor2_0"),
)

HUNYUAN = ModelAdapter(
    name="HunyuanVideo",
    classes=("HunyuanVideoTransformer3DModel",),
    blocks=(_HUNYUAN_TWO_STREAM, _HUNYUAN_SINGLE_STREAM),
    grid=_hunyuan_tokens,
    level=timestep_level(),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    guidance="calls",
)


def _cogvideo_grid(model: nn.Module, call: Arguments) -> Grid:
    frames, _, rows, columns = call["hidden_states"].shape[-4:]
    config: Any = model.config
    size, duration = config["patch_size"], config.get("patch_size_t") or 1
    return -(-frames // duration), rows // size, columns // size


COGVIDEOX = ModelAdapter(
    name="CogVideoX",
    classes=("CogVideoXTransformer3DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("tokens", "text"),
            follow=(Follow("image_rotary_emb", axis=0, batched=False),),
            inside_mlp="last",
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.cogvideox,
            time="temb",  # with the embedding of `ofs`, as in the published indicator
            products=Products(joint=("attn1.*",)),
            width=attention_and_mlp("attn1", "ff", "CogVideoXAttnProcessor2_0"),
        ),
    ),
    grid=_cogvideo_grid,
    level=timestep_level(),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
)
