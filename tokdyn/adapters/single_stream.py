"""Models of diffusers that keep text and image tokens in one sequence: Z-Image and Lumina 2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Follow, ModelAdapter, Stack
from tokdyn.adapters.readers import CONTROL, IP_ADAPTER, patches, timestep
from tokdyn.adapters.width import Width, mlp, processed, projections
from tokdyn.errors import InputError
from tokdyn.tokens import Grid


def _zimage_grid(model: nn.Module, call: Arguments) -> Grid:
    latents = call["x"]
    if isinstance(latents[0], list):
        raise InputError("tokdyn.wrap takes one image a sample in ZImageTransformer2DModel; leave the others out.")
    sizes = {tuple(each.shape[-3:]) for each in latents}
    if len(sizes) > 1:
        raise InputError(f"the images are {sorted(sizes)}; wrapped, all images of a call have one size.")
    frames, rows, columns = sizes.pop()
    across, along = call.get("patch_size", 2), call.get("f_patch_size", 1)
    grid = (frames // along, rows // across, columns // across)
    return grid[1:] if grid[0] == 1 else grid


ZIMAGE = ModelAdapter(
    name="Z-Image",
    classes=("ZImageTransformer2DModel",),
    stacks=(
        Stack(
            "layers",
            tokens="x",
            image="first",
            joint="first",
            follow=(Follow("attn_mask"), Follow("attention_mask"), Follow("freqs_cis")),
            attention=("attention",),
            mlp=("feed_forward",),
            modulated=modulation.scale_alone,
            width=Width(
                cuts=(*projections("attention"), *mlp("feed_forward.w2", "feed_forward.w1", "feed_forward.w3")),
                inner="attention.to_out.0.in_features",
                hidden="feed_forward.w2.in_features",
                attention=("attention",),
                known=processed("attention", "ZSingleStreamAttnProcessor"),
            ),
        ),
    ),
    grid=_zimage_grid,
    level=timestep("t", scale=1.0, backwards=True),
    refuse={"controlnet_block_samples": CONTROL, "siglip_feats": IP_ADAPTER, "image_noise_mask": IP_ADAPTER},
    width=lambda model: int(model.config["dim"]),  # type: ignore[index]
    heads=lambda model: int(model.config["n_heads"]),  # type: ignore[index]
    guidance="cond_first",
)


def _lumina_grid(model: nn.Module, call: Arguments) -> Grid:
    mask: Tensor = call["encoder_attention_mask"]
    lengths = mask.sum(dim=1)
    if not torch.equal(lengths, lengths[:1].expand_as(lengths)):
        raise InputError(
            "the prompts differ in length, so image tokens begin at different places in Lumina2Transformer2DModel; "
            "call a wrapped model with one prompt, or prompts of one length, at a time."
        )
    return patches(model, call)


LUMINA2 = ModelAdapter(
    name="Lumina 2",
    classes=("Lumina2Transformer2DModel",),
    stacks=(
        Stack(
            "layers",
            image="last",
            follow=(Follow("attention_mask"), Follow("image_rotary_emb")),
            attention=("attn",),
            mlp=("feed_forward",),
            modulated=modulation.embedding,
            width=Width(
                cuts=(
                    *projections("attn"),
                    *mlp("feed_forward.linear_2", "feed_forward.linear_1", "feed_forward.linear_3"),
                ),
                inner="attn.to_out.0.in_features",
                hidden="feed_forward.linear_2.in_features",
                attention=("attn",),
                known=processed("attn", "Lumina2AttnProcessor2_0"),
            ),
        ),
    ),
    grid=_lumina_grid,
    read_ahead=("encoder_attention_mask",),
    level=timestep(scale=1.0, backwards=True),
    refuse={"attention_kwargs": IP_ADAPTER},
    width=lambda model: int(model.config["hidden_size"]),  # type: ignore[index]
    guidance="calls",
)
