"""Adapters of image models with streams of their own for text and image: HunyuanImage, Flux 3 and GLM-Image."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.flux import FLUX
from tokdyn.adapters.mmdit import COGVIEW4
from tokdyn.adapters.readers import IMAGE_PROMPT_REASON, timestep_level
from tokdyn.adapters.video import HUNYUAN
from tokdyn.adapters.width import (
    Width,
    attention_and_mlp,
    attention_beside_mlp,
    attention_layers,
    mlp_layers,
    runs_processor,
)
from tokdyn.tokens import Grid


def _hunyuan_grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of an image (B, C, rows, columns), or with frames before the rows."""
    patch = model.config["patch_size"]  # type: ignore[index]
    return tuple(size // part for size, part in zip(call["hidden_states"].shape[2:], patch, strict=True))


HUNYUAN_IMAGE = replace(
    HUNYUAN,
    name="HunyuanImage",
    classes=("HunyuanImageTransformer2DModel",),
    blocks=(
        replace(HUNYUAN.blocks[0], width=attention_and_mlp("attn", "ff", "HunyuanImageAttnProcessor")),
        replace(HUNYUAN.blocks[1], width=attention_beside_mlp("attn", "HunyuanImageAttnProcessor")),
    ),
    grid=_hunyuan_grid,
)


def _flux3_modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated image tokens of a block of Flux 3, whose modulation has an entry per token."""
    shift, scale, _ = arguments["temb_mod"].chunk(3, dim=-1)
    out: Tensor = block.norm(arguments["hidden_states"]) * (1 + scale) + shift  # type: ignore[operator]
    return out


def _flux3_references(call: Arguments) -> int:
    """Count the tokens of reference images, which follow those of the image from the joint blocks on."""
    tokens = call.get("image_cond_hidden_states")
    return 0 if tokens is None else int(tokens.shape[1])


_FLUX3_FOLLOW = (Follow("temb_mod"), Follow("image_rotary_emb", axis=0, batched=False))
_FLUX3_WIDTH = Width(
    layers=(*attention_layers("attn"), *mlp_layers("ff.linear_out", "ff.linear_in")),
    inner="attn.to_out.0.in_features",
    hidden="ff.linear_out.in_features",
    attention=("attn",),
    sliceable=runs_processor("attn", "Flux3AttnProcessor"),
)

FLUX3 = ModelAdapter(
    name="Flux 3",
    classes=("Flux3Transformer2DModel",),
    blocks=(
        Blocks(
            "mode_blocks.image",  # the image tokens before they meet the text tokens
            follow=_FLUX3_FOLLOW,
            attention=("attn",),
            mlp=("ff",),
            modulated=_flux3_modulated,
            width=_FLUX3_WIDTH,
        ),
        Blocks(
            "single_transformer_blocks",
            text="encoder_hidden_states",
            returns=("text", "tokens"),
            image="last",  # reference images, which follow, are moved before it
            inside="last",
            inside_mlp="last",
            follow=_FLUX3_FOLLOW,
            attention=("attn",),
            mlp=("ff",),
            width=_FLUX3_WIDTH,
        ),
    ),
    grid=FLUX.grid,
    read_ahead=FLUX.read_ahead,
    level=timestep_level(scale=1.0),
    varying=("target_timestep",),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    behind=_flux3_references,
    guidance="calls",
)


def _glm_level(model: nn.Module, call: Arguments) -> Tensor:
    """Return the noise level of a timestep that the pipeline has lowered by 1."""
    timestep: Tensor = call["timestep"]
    return (timestep.float() + 1) / 1000


GLM_IMAGE = replace(
    COGVIEW4,
    name="GLM-Image",
    classes=("GlmImageTransformer2DModel",),
    blocks=(
        replace(
            COGVIEW4.blocks[0],
            modulated=modulation.cogvideox,
            products=Products(joint=("ff.*",), pair_mask="attention_mask"),
            width=attention_and_mlp("attn1", "ff", "GlmImageAttnProcessor"),
        ),
    ),
    level=_glm_level,
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    refuse_always={"kv_caches": "they hold keys and values of reference images from every block; leave the images out"},
)
