"""Adapters of the models of Bria: Bria 3.2, Fibo and Fibo 2.

The first two are built like Flux. Before every block, Fibo replaces half of the channels of its text tokens by another
layer of its text encoder, and it joins them with the image tokens outside of its single-stream blocks. Fibo 2 is built
like Z-Image: a few tokens stand for the prompt ahead of the image tokens, and some blocks read the prompt as well.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.flux import FLUX
from tokdyn.adapters.readers import (
    CONTROL_REASON,
    IMAGE_PROMPT_REASON,
    patch_grid,
    timestep_level,
)
from tokdyn.adapters.width import (
    Width,
    attention_and_mlp,
    attention_beside_mlp,
    attention_layers,
    mlp_layers,
    runs_processor,
)
from tokdyn.errors import InputError
from tokdyn.tokens import ImageTokens

_PROCESSORS = ("BriaAttnProcessor", "BriaFiboAttnProcessor")
_TWO_STREAMS = replace(FLUX.blocks[0], width=attention_and_mlp("attn", "ff", *_PROCESSORS))
_SINGLE = attention_beside_mlp("attn", *_PROCESSORS, hiddens=("mlp_hidden_dim",))

BRIA = replace(
    FLUX,
    name="Bria",
    classes=("BriaTransformer2DModel",),
    blocks=(_TWO_STREAMS, replace(FLUX.blocks[1], width=_SINGLE)),
    level=timestep_level(),
    refuse={
        "controlnet_block_samples": CONTROL_REASON,
        "controlnet_single_block_samples": CONTROL_REASON,
        "attention_kwargs": IMAGE_PROMPT_REASON,
    },
    guidance="uncond_first",
)

FIBO = replace(
    BRIA,
    name="Bria Fibo",
    classes=("BriaFiboTransformer2DModel",),
    blocks=(
        _TWO_STREAMS,
        Blocks(
            "single_transformer_blocks",
            image="last",
            follow=FLUX.blocks[1].follow,
            attention=("attn",),
            mlp=(),
            width=_SINGLE,
        ),
    ),
    refuse={"joint_attention_kwargs": IMAGE_PROMPT_REASON},
)


def _fibo2_tokens(model: nn.Module, call: Arguments) -> ImageTokens:
    """Return the grids of a call in which the image tokens come last, those of images to edit after the others.

    Raises:
        InputError: they come first, as among prompts of several lengths.
    """
    mask = call.get("encoder_attention_mask")
    lengths = [] if mask is None else mask.sum(dim=1).tolist()
    if len(set(lengths)) > 1:
        raise InputError(
            f"the prompts have {lengths} tokens, so the image tokens of a BriaFibo2Transformer2DModel may begin at "
            "different places; call a wrapped one with prompts of one length at a time."
        )
    size = model.config["patch_size"]  # type: ignore[index]
    references = [tuple(side // size for side in image.shape[2:]) for image in call.get("context_latents") or ()]
    return ImageTokens(patch_grid(model, call), tuple(references))


def _fibo2_modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated tokens of a block of Fibo 2, which scales noisy and clean tokens by their own timesteps."""
    noisy, clean = (
        block.adaLN_modulation(arguments[name]).chunk(4, dim=1)[0][:, None]  # type: ignore[operator]
        for name in ("adaln_noisy", "adaln_clean")
    )
    scale = torch.where(arguments["noise_mask"][..., None] == 1, noisy, clean)
    out: Tensor = block.attention_norm1(arguments["x"]) * (1 + scale)  # type: ignore[operator]
    return out


FIBO2 = ModelAdapter(
    name="Bria Fibo 2",
    classes=("BriaFibo2Transformer2DModel",),
    blocks=(
        Blocks(
            "layers",
            tokens="x",
            image="last",
            follow=(Follow("freqs_cis"), Follow("noise_mask")),
            attention=("attention",),
            mlp=("feed_forward",),
            modulated=_fibo2_modulated,
            products=Products(cross=("cross_attention",), cross_joint=True, twice=("adaLN_modulation.*",)),
            width=Width(
                layers=(
                    *attention_layers("attention"),
                    *mlp_layers("feed_forward.w2", "feed_forward.w1", "feed_forward.w3"),
                ),
                inner="attention.to_out.0.in_features",
                hidden="feed_forward.w2.in_features",
                attention=("attention",),
                sliceable=runs_processor("attention", "BriaFibo2AttnProcessor"),
            ),
        ),
    ),
    grid=_fibo2_tokens,
    read_ahead=("encoder_attention_mask",),
    level=timestep_level(scale=1.0),
    width=lambda model: int(model.config["dim"]),  # type: ignore[index]
    heads=lambda model: int(model.config["n_heads"]),  # type: ignore[index]
    guidance="calls",
)
