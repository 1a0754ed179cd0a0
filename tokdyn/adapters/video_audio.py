"""Adapters of diffusers' models that generate video and sound together: LTX-2, Kandinsky 6 and MiniMax-H3.

Methods that leave out or merge tokens act on the tokens of the video. In LTX-2 and Kandinsky 6 the sound is a stream of
its own, in MiniMax-H3 it lies with text and conditions before the video, in one sequence.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter
from tokdyn.adapters.products import CrossAttention, Products
from tokdyn.adapters.readers import (
    IMAGE_PROMPT_REASON,
    channels_last_grid,
    frame_level,
    grid_of_patches,
    grids_behind,
    timestep_level,
    with_given_frames,
)
from tokdyn.adapters.width import SlicedLayer, Width, attention_and_mlp, mlp_layers, runs_processor
from tokdyn.tokens import Grid, ImageTokens, cells


def _ltx2_sliceable(block: nn.Module) -> bool:
    """Tell whether attention has no gate for each head, and one rotary table that spans all heads."""
    attention: Any = block.attn1
    known = runs_processor("attn1", "LTX2AudioVideoAttnProcessor", "LTX2PerturbedAttnProcessor")(block)
    return known and attention.to_gate_logits is None and attention.rope_type == "interleaved"


def _ltx2_tokens(model: nn.Module, call: Arguments) -> ImageTokens:
    """Read the grid. First frames that the video is conditioned on are less noisy than others.

    Tokens of other conditions follow the video: images between its frames, and videos to refer to. So do those of
    frames that are generated beside it, which lie on no place of its grid.
    """
    level: Tensor = call["timestep"]
    spans: Any = call.get("video_coords")
    named: Any = tuple(call.get(name) for name in ("num_frames", "height", "width"))
    grid: Grid = grid_of_patches(spans) if None in named else named
    own = cells(grid)
    tokens = with_given_frames(grid, level[:, :own] if level.dim() > 1 else level, strengths=True)
    tokens = tokens if isinstance(tokens, ImageTokens) else ImageTokens(tokens)
    if spans is None or call["hidden_states"].shape[1] <= own:
        return tokens
    behind = grids_behind(spans[:, :, own:, 0], level[:, own:] if level.dim() > 1 and level.shape[1] > 1 else None)
    return tokens._replace(references=tokens.references + behind)


_LTX2_WIDTH = attention_and_mlp("attn1", "ff", tables=("video_rotary_emb",))

_PERTURBED = ("attn1", "attn1.to_[qk]*", "audio_attn1", "audio_attn1.to_[qk]*")
_LTX2_PRODUCTS = Products(
    cross=("attn2",),
    mlp=("ff*", "audio_ff.*"),
    between=(
        CrossAttention("audio_attn1", "audio_hidden_states", "audio_hidden_states"),
        CrossAttention("audio_attn2", "audio_hidden_states", "audio_encoder_hidden_states"),
        CrossAttention("audio_to_video_attn", "image", "audio_hidden_states"),
        CrossAttention("video_to_audio_attn", "audio_hidden_states", "image"),
    ),
    over={"audio_hidden_states": ("audio_ff.*",)},
    needs={
        "use_a2v_cross_attention": ("audio_to_video_attn*",),
        "use_v2a_cross_attention": ("video_to_audio_attn*",),
        "not all_perturbed": _PERTURBED,  # values go through unchanged then
    },
)

LTX2 = ModelAdapter(
    name="LTX-2",
    classes=("LTX2VideoTransformer3DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            streams=("audio_hidden_states",),
            returns=("tokens", "audio_hidden_states"),
            follow=(
                Follow("video_rotary_emb", dims=3),
                Follow("video_rotary_emb", axis=2, dims=4),  # one table per head
                Follow("query_rotary_emb", dims=3),  # the name in attention
                Follow("query_rotary_emb", axis=2, dims=4),
                Follow("ca_video_rotary_emb", dims=3),
                Follow("ca_video_rotary_emb", axis=2, dims=4),
                Follow("temb"),
                Follow("temb_ca_scale_shift"),
                Follow("temb_ca_gate"),
                Follow("self_attention_mask", dims=3),
                Follow("self_attention_mask", axis=2, dims=3),
                Follow("attention_mask", dims=3),
                Follow("attention_mask", axis=2, dims=3),
            ),
            attention=("attn1",),
            mlp=("ff",),
            modulated=modulation.ltx2,
            products=_LTX2_PRODUCTS,
            width=Width(
                _LTX2_WIDTH.layers,
                _LTX2_WIDTH.inner,
                _LTX2_WIDTH.hidden,
                _LTX2_WIDTH.attention,
                tables=_LTX2_WIDTH.tables,
                sliceable=_ltx2_sliceable,
            ),
        ),
    ),
    grid=_ltx2_tokens,
    read_ahead=("timestep", "video_coords"),
    level=frame_level(),
    varying=("audio_hidden_states", "audio_timestep", "audio_sigma"),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
)

_KANDINSKY6_WIDTH = Width(
    layers=(
        SlicedLayer("video_dec_block.self_attention.to_query", out=("heads",)),
        SlicedLayer("video_dec_block.self_attention.to_key", out=("heads",)),
        SlicedLayer("video_dec_block.self_attention.to_value", out=("heads",)),
        SlicedLayer("video_dec_block.self_attention.out_layer", into=("heads",)),
        *mlp_layers("video_dec_block.feed_forward.net.2", "video_dec_block.feed_forward.net.0.proj"),
    ),
    inner="video_dec_block.self_attention.out_layer.in_features",
    hidden="video_dec_block.feed_forward.net.2.in_features",
    attention=("video_dec_block.self_attention",),
    counts=("num_heads",),
)

_KANDINSKY6_PRODUCTS = Products(
    mlp=("*.feed_forward.*",),
    between=(
        CrossAttention("video_dec_block.cross_attention", "image", "text_v"),
        CrossAttention("audio_dec_block.self_attention", "aud", "aud"),
        CrossAttention("audio_dec_block.cross_attention", "aud", "text_a"),
        CrossAttention("va_cross_attention", "image", "aud"),
        CrossAttention("av_cross_attention", "aud", "image"),
    ),
    over={"aud": ("audio_dec_block.feed_forward.*",)},
    needs={"aud": ("audio_dec_block.*", "va_*", "av_*")},
    indicator=("video_dec_block.visual_modulation.*",),
)

KANDINSKY6 = ModelAdapter(
    name="Kandinsky 6",
    classes=("Kandinsky6Transformer3DModel",),
    blocks=(
        Blocks(
            "visual_transformer_blocks",
            tokens="vis",
            streams=("aud",),
            returns=("tokens", "aud"),
            follow=(
                Follow("vis_rope", axis=0, batched=False),
                Follow("rotary_emb", axis=0, batched=False),  # the name in attention
            ),
            shared=("aud_rope",),
            attention=("video_dec_block.self_attention",),
            mlp=("video_dec_block.feed_forward",),
            modulated=modulation.kandinsky6,
            products=_KANDINSKY6_PRODUCTS,
            width=_KANDINSKY6_WIDTH,
        ),
    ),
    grid=channels_last_grid,
    level=timestep_level(),
    varying=("audio_hidden_states",),
    width=lambda model: int(model.config["model_dim"]),  # type: ignore[index]
    heads=lambda model: int(model.config["model_dim"]) // sum(model.config["axes_dims"]),  # type: ignore[index]
    guidance="calls",
)


def _h3_grid(model: nn.Module, call: Arguments) -> Grid:
    """Read the grid of the video, whose tokens are the last of the sequence, from their positions in time."""
    place: Tensor = call["position_ids"]
    count = call["video_indices"].numel()
    last = int(call["video_indices"][-1]) + 1
    positions = place[last - count : last].cpu()
    frame = int((positions[:, 0] == positions[-1, 0]).sum())
    frames = 1
    while (frames + 1) * frame <= count:
        before = positions[-(frames + 1) * frame : -frames * frame, 0]
        if bool((before != before[0]).any()) or before[0] >= positions[-frames * frame, 0]:
            break  # tokens of a condition, or of sound
        frames += 1
    columns = len(set(positions[-frame:, 2].tolist()))
    return frames, frame // columns, columns


def _h3_level(model: nn.Module, call: Arguments) -> Tensor:
    """Return the noise level of the video: its timestep runs from 0, noise, to 1, the image."""
    rows: Tensor = call["timestep_indices"][call["video_indices"][-1:]]
    level: Tensor = 1.0 - call["timestep"].float()[rows]
    return level


MINIMAX_H3 = ModelAdapter(
    name="MiniMax-H3",
    classes=("MiniMaxH3Transformer3DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            image="last",
            follow=(
                Follow("adaln_indices", axis=0, batched=False),
                Follow("rotary_emb", axis=0, batched=False),
            ),
            shared=("temb",),
            alone=True,  # `adaln_indices` must be one vector
            keeps_text=True,  # the tokens of the sound
            attention=("attn",),
            mlp=("ff",),
            modulated=modulation.minimax_h3,
            products=Products(sample=("adaln_proj.*",), over={"temb": ("adaln_proj.*",)}, indicator=("adaln_proj.*",)),
            width=attention_and_mlp("attn", "ff", "MiniMaxH3AttnProcessor"),
        ),
    ),
    grid=_h3_grid,
    read_ahead=("position_ids", "video_indices"),
    level=_h3_level,
    varying=("audio_hidden_states",),
    width=lambda model: int(model.config["hidden_size"]),  # type: ignore[index]
    guidance="calls",
)
