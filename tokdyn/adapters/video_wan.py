"""Adapters of diffusers' models that are built like Wan, or from its blocks: VACE, Wan Animate, AnyFlow and Helios."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Follow, ModelAdapter, Products
from tokdyn.adapters.readers import frame_level, timestep_level, video_grid, with_given_frames
from tokdyn.adapters.video import WAN
from tokdyn.adapters.width import attention_and_mlp, runs_processor
from tokdyn.tokens import Grid, ImageTokens

WAN_VACE = replace(
    WAN,
    name="Wan VACE",
    classes=("WanVACETransformer3DModel",),
    blocks=(replace(WAN.blocks[0], full_between=True),),  # the results of its control blocks are added between blocks
)

WAN_ANIMATE = replace(
    WAN_VACE,  # attention to the motion of a face comes between blocks
    name="Wan Animate",
    classes=("WanAnimateTransformer3DModel",),
)


def _anyflow_tokens(model: nn.Module, call: Arguments) -> Grid | ImageTokens:
    """Read the grid; frames that the video continues are clean and have timestep 0."""
    frames, _, rows, columns = call["hidden_states"].shape[1:]
    patch = model.config["patch_size"]  # type: ignore[index]
    return with_given_frames((frames, rows // patch[1], columns // patch[2]), call["timestep"])


ANYFLOW = ModelAdapter(
    name="AnyFlow",
    classes=("AnyFlowTransformer3DModel",),
    blocks=(
        replace(
            WAN.blocks[0],
            follow=(Follow("rotary_emb", axis=2, dims=4), Follow("temb", dims=4)),
            products=Products(cross=("attn2",)),
            width=attention_and_mlp("attn1", "ffn", "AnyFlowAttnProcessor"),
        ),
    ),
    grid=_anyflow_tokens,
    read_ahead=("timestep",),
    level=frame_level(),
    varying=("r_timestep",),
)


def _one_scale(block: nn.Module) -> bool:
    """Tell whether the keys of earlier frames are not scaled by a number for each head, so that heads can be sliced."""
    scaled: Any = block.attn1
    return not scaled.is_amplify_history and runs_processor("attn1", "HeliosAttnProcessor")(block)


HELIOS = ModelAdapter(
    name="Helios",
    classes=("HeliosTransformer3DModel",),
    blocks=(
        replace(
            WAN.blocks[0],
            image="last",  # behind the tokens of earlier frames
            follow=(Follow("rotary_emb"), Follow("temb", dims=4), Follow("original_context_length")),
            modulated=modulation.shift_table_per_token,
            products=Products(cross=("attn2",), cross_joint=lambda block: not block.guidance_cross_attn),
            width=replace(attention_and_mlp("attn1", "ffn"), sliceable=_one_scale),
        ),
    ),
    grid=video_grid,
    level=timestep_level(),
    guidance="calls",
)
