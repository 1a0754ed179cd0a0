"""Adapters of diffusers' video models whose text and video streams meet in attention.

These are HunyuanVideo 1.5 and its Framepack sibling, Mochi, EasyAnimate, ConsisID and Motif Video.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.products import CrossAttention
from tokdyn.adapters.readers import IMAGE_PROMPT_REASON, timestep_level, video_grid
from tokdyn.adapters.video import COGVIDEOX, HUNYUAN
from tokdyn.adapters.width import attention_and_mlp, attention_beside_mlp, runs_processor
from tokdyn.tokens import ImageTokens

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
    varying=("timestep_r",),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    guidance="calls",
)


def _framepack_tokens(model: nn.Module, call: Arguments) -> ImageTokens:
    """Read the grid, and those of earlier frames, whose tokens come first; the oldest stand for more pixels."""
    earlier = [("latents_history_4x", (4, 8, 8)), ("latents_history_2x", (2, 4, 4)), ("latents_clean", (1, 2, 2))]
    grids = [
        tuple(-(-length // part) for length, part in zip(call[name].shape[2:], patch, strict=True))
        for name, patch in earlier
        if call.get(name) is not None
    ]
    return ImageTokens(video_grid(model, call), tuple(grids), leading=len(grids))


FRAMEPACK = replace(
    HUNYUAN,
    name="HunyuanVideo Framepack",
    classes=("HunyuanVideoFramepackTransformer3DModel",),
    grid=_framepack_tokens,
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
            width=attention_and_mlp("attn1", "ff"),  # never sliced: every head has rotary tables of its own
        ),
    ),
    grid=video_grid,
    level=timestep_level(backwards=True),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    softmax=False,  # attention is computed for one sample after another, because prompts differ in length
)

_EASYANIMATE_PRODUCTS = Products(text=(*Products().text, "txt_ff.*"), mlp=("ff*", "txt_ff.*"))

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
            products=_EASYANIMATE_PRODUCTS,
            width=attention_and_mlp("attn1", "ff", "EasyAnimateAttnProcessor2_0"),
        ),
    ),
    grid=video_grid,
    level=timestep_level(),
    fits=lambda model: bool(model.config["mmdit_layers"] >= model.config["num_layers"]),  # type: ignore[index]
)

EASYANIMATE_SHARED = replace(
    EASYANIMATE,
    name="EasyAnimate with shared layers",
    blocks=(
        replace(
            EASYANIMATE.blocks[0],
            mlp=(),  # the last blocks call one MLP on the video tokens and then on the text tokens
            products=replace(
                _EASYANIMATE_PRODUCTS,
                joint=lambda block: () if block.txt_ff else ("ff.*",),
                over={"image": ("attn1.to_out*",)},
            ),
        ),
    ),
    fits=None,
)

CONSISID = replace(
    COGVIDEOX,
    name="ConsisID",
    classes=("ConsisIDTransformer3DModel",),
    blocks=(replace(COGVIDEOX.blocks[0], full_between=True),),  # features of the face are added between blocks
)


def _decodes(model: nn.Module) -> str | None:
    """Return why a Motif Video model with decoder blocks needs all its tokens; None for other models."""
    if not model.config["num_decoder_layers"]:  # type: ignore[index]
        return None
    return (
        "its last blocks begin again with the tokens of the first block and read those of the others as text, so that "
        "none may be missing; use DepthSkip or FeatureCache"
    )


def _without_cross_attention(block: nn.Module) -> bool:
    """Tell whether a single-stream block lacks cross-attention, which reads the channels of all heads."""
    cross: Any = block.cross_attn
    return cross is None and runs_processor("attn", "MotifVideoAttnProcessor2_0")(block)


_MOTIF_TWO_STREAM = replace(
    HUNYUAN15.blocks[0],
    follow=(Follow("image_rotary_emb", axis=0, batched=False), Follow("attention_mask", axis=3, dims=4)),
    products=Products(
        between=(CrossAttention("cross_attn", "image", "text", without="image_embed_seq_len"),), joint=("proj_*",)
    ),
    width=attention_and_mlp("attn", "ff", "MotifVideoAttnProcessor2_0"),
)

MOTIF = ModelAdapter(
    name="Motif Video",
    classes=("MotifVideoTransformer3DModel",),
    blocks=(
        _MOTIF_TWO_STREAM,
        replace(
            _MOTIF_TWO_STREAM,
            path="single_transformer_blocks",
            inside_mlp="first",
            mlp=(),
            modulated=None,
            width=replace(attention_beside_mlp("attn"), sliceable=_without_cross_attention),
        ),
    ),
    grid=video_grid,
    level=timestep_level(),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    guidance="calls",
    whole=_decodes,
)
