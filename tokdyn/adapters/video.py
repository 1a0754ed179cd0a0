"""Video models of diffusers: Wan, SkyReels, LTX-Video, HunyuanVideo and CogVideoX."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from torch import nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Follow, ModelAdapter, Products, Stack
from tokdyn.adapters.readers import IP_ADAPTER, timestep
from tokdyn.adapters.width import Width, attention_and_mlp, attention_beside_mlp
from tokdyn.tokens import Grid


def _wan_grid(model: nn.Module, call: Arguments) -> Grid:
    patch = model.config["patch_size"]  # type: ignore[index]
    return tuple(size // part for size, part in zip(call["hidden_states"].shape[-3:], patch, strict=True))


WAN = ModelAdapter(
    name="Wan",
    classes=("WanTransformer3DModel", "ChronoEditTransformer3DModel"),
    stacks=(
        Stack(
            "blocks",
            follow=(Follow("rotary_emb"), Follow("temb", dims=4)),
            attention=("attn1",),
            mlp=("ffn",),
            modulated=modulation.shift_table_per_token,
            products=Products(cross=("attn2",), words=512),
            width=attention_and_mlp("attn1", "ffn", "WanAttnProcessor", "SkyReelsV2AttnProcessor"),
        ),
    ),
    grid=_wan_grid,
    level=timestep(),
    refuse={"attention_kwargs": IP_ADAPTER},
    guidance="calls",
)


def _frame_by_frame(model: nn.Module) -> str | None:
    if model.config["num_frame_per_block"] == 1:  # type: ignore[index]
        return None
    return (
        "num_frame_per_block lets frames see the ones before them alone, by a mask with an entry for every pair of "
        "cells; build it with num_frame_per_block=1, or use DepthSkip or FeatureCache"
    )


SKYREELS = replace(
    WAN,
    name="SkyReels V2",
    classes=("SkyReelsV2Transformer3DModel",),
    stacks=(replace(WAN.stacks[0], follow=(Follow("rotary_emb"), Follow("temb", axis=2, dims=4))),),
    whole=_frame_by_frame,
)

LTX = ModelAdapter(
    name="LTX-Video",
    classes=("LTXVideoTransformer3DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            follow=(Follow("image_rotary_emb"), Follow("temb", dims=3)),
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.shift_table_per_token,
            products=Products(cross=("attn2",)),
            width=attention_and_mlp("attn1", "ff", "LTXVideoAttnProcessor", tables=("image_rotary_emb",)),
        ),
    ),
    grid=lambda model, call: (call["num_frames"], call["height"], call["width"]),
    level=timestep(),
    refuse={"attention_kwargs": IP_ADAPTER},
)


def _hunyuan_grid(model: nn.Module, call: Arguments) -> Grid:
    frames, rows, columns = call["hidden_states"].shape[-3:]
    across, along = model.config["patch_size"], model.config["patch_size_t"]  # type: ignore[index]
    return frames // along, rows // across, columns // across


def _first_frame(model: nn.Module) -> str | None:
    if model.config["image_condition_type"] != "token_replace":  # type: ignore[index]
        return None
    return (
        "image_condition_type='token_replace' modulates the tokens of the first frame by their place; use DepthSkip or "
        "FeatureCache"
    )


_HUNYUAN_SINGLE = attention_beside_mlp("attn", "HunyuanVideoAttnProcessor2_0")

_HUNYUAN_STACKS: tuple[tuple[str, tuple[str, ...], Literal["first"] | None, Any, tuple[str, ...], Width], ...] = (
    (
        "transformer_blocks",
        ("ff",),
        None,
        modulation.embedding,
        (),
        attention_and_mlp("attn", "ff", "HunyuanVideoAttnProcessor2_0"),
    ),
    ("single_transformer_blocks", (), "first", None, ("*",), _HUNYUAN_SINGLE),
)

HUNYUAN = ModelAdapter(
    name="HunyuanVideo",
    classes=("HunyuanVideoTransformer3DModel",),
    stacks=tuple(
        Stack(
            path,
            text="encoder_hidden_states",
            returns=("tokens", "text"),
            joint="first",
            follow=(
                Follow("attention_mask", axis=3),
                Follow("freqs_cis", axis=0, batched=False),  # what double blocks call it
                Follow("image_rotary_emb", axis=0, batched=False),
            ),
            attention=("attn",),
            mlp=parts,
            inside_mlp=inside,
            modulated=modulated,
            products=Products(joint=joint),
            width=width,
        )
        for path, parts, inside, modulated, joint, width in _HUNYUAN_STACKS
    ),
    grid=_hunyuan_grid,
    level=timestep(),
    refuse={"attention_kwargs": IP_ADAPTER},
    guidance="calls",
    whole=_first_frame,
)


def _cogvideo_grid(model: nn.Module, call: Arguments) -> Grid:
    frames, _, rows, columns = call["hidden_states"].shape[-4:]
    across, along = model.config["patch_size"], model.config["patch_size_t"] or 1  # type: ignore[index]
    return -(-frames // along), rows // across, columns // across


COGVIDEOX = ModelAdapter(
    name="CogVideoX",
    classes=("CogVideoXTransformer3DModel",),
    stacks=(
        Stack(
            "transformer_blocks",
            text="encoder_hidden_states",
            returns=("tokens", "text"),
            follow=(Follow("image_rotary_emb", axis=0, batched=False),),
            inside_mlp="last",
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.with_text,
            products=Products(joint=("attn1.*",)),
            width=attention_and_mlp("attn1", "ff", "CogVideoXAttnProcessor2_0"),
        ),
    ),
    grid=_cogvideo_grid,
    level=timestep(),
    refuse={"attention_kwargs": IP_ADAPTER},
)
