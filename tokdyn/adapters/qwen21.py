"""Adapter of Qwen-Image 2.1: prompt, reference images and image in one sequence, of which only the image sees all."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.readers import IMAGE_PROMPT_REASON, timestep_level
from tokdyn.adapters.width import Width, attention_layers, mlp_layers, runs_processor
from tokdyn.tokens import Grid


def _grid(model: nn.Module, call: Arguments) -> Grid:
    """Return the grid of the image, which comes after reference images in `img_shapes`."""
    frames, rows, columns = call["img_shapes"][0][-1]
    return (rows, columns) if frames == 1 else (frames, rows, columns)


def _modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of Qwen-Image 2.1.

    Tokens before the image are modulated by the last row of `modulation`, whose timestep is 0, if there is one.
    """
    scale = arguments["modulation"].chunk(4, dim=-1)[0]
    noisy, scales = arguments.get("target_token_mask"), scale[:, None]
    if noisy is not None:
        noisy = noisy.view(1, -1, 1)
        scales = torch.where(noisy, scale[:-1, None], scale[-1:])
    out: Tensor = block.img_norm1(arguments["hidden_states"]) * (1 + scales)  # type: ignore[operator]
    return out


def _needs_block_mask(model: nn.Module) -> str | None:
    """Return why a model whose attention runs flex_attention needs all tokens; None for other models."""
    processors = [type(block.attn.processor).__name__ for block in model.transformer_blocks]  # type: ignore[union-attr]
    if "QwenImage21FlexAttnProcessor" not in processors:
        return None
    return (
        "the mask of flex_attention has one entry per pair of tokens; set QwenImage21AttnProcessor, or use DepthSkip "
        "or FeatureCache"
    )


QWEN21 = ModelAdapter(
    name="Qwen-Image 2.1",
    classes=("QwenImage21Transformer2DModel",),
    blocks=(
        Blocks(
            "transformer_blocks",
            image="last",
            follow=(
                Follow("rotary_emb", axis=0, batched=False),
                Follow("target_token_mask", axis=0, batched=False),
                Follow("key_valid"),
            ),
            rounds=("modulation",),  # of every sample, and then of a timestep of 0
            attention=("attn",),
            mlp=("img_mlp",),
            modulated=_modulated,
            products=Products(text_sees="text"),
            width=Width(
                layers=(
                    *attention_layers("attn"),
                    *mlp_layers("img_mlp.out", "img_mlp.proj", "img_mlp.gate_layer"),
                ),
                inner="attn.to_out.0.in_features",
                hidden="img_mlp.out.in_features",
                attention=("attn",),
                sliceable=runs_processor("attn", "QwenImage21AttnProcessor", "QwenImage21FlexAttnProcessor"),
            ),
        ),
    ),
    grid=_grid,
    level=timestep_level(scale=1.0),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    refuse_always={
        "kv_cache": "it holds keys and values of every block from an earlier call; set use_kv_cache=False in a pipeline"
    },
    guidance="calls",
    whole=_needs_block_mask,
)
