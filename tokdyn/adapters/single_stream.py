"""Adapters of diffusers models that keep text and image tokens in one sequence throughout: Z-Image and Lumina 2."""

from __future__ import annotations

from torch import Tensor, nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter
from tokdyn.adapters.readers import CONTROL_REASON, IMAGE_PROMPT_REASON, patch_grid, timestep_level
from tokdyn.adapters.width import Width, attention_layers, mlp_layers, runs_processor
from tokdyn.errors import InputError
from tokdyn.tokens import Grid, ImageTokens


def _zimage_grid(model: nn.Module, call: Arguments) -> Grid:
    latents = call["x"]
    if isinstance(latents[0], list):
        raise InputError(
            "x holds several images per sample; a wrapped ZImageTransformer2DModel takes one, so leave the others out."
        )
    sizes = {tuple(latent.shape[-3:]) for latent in latents}
    if len(sizes) > 1:
        raise InputError(
            f"the images in x have the sizes {sorted(sizes)}; call a wrapped ZImageTransformer2DModel with images of "
            "one size at a time."
        )
    frames, rows, columns = sizes.pop()
    size, duration = call.get("patch_size", 2), call.get("f_patch_size", 1)
    grid = (frames // duration, rows // size, columns // size)
    return grid[1:] if grid[0] == 1 else grid


ZIMAGE = ModelAdapter(
    name="Z-Image",
    classes=("ZImageTransformer2DModel",),
    blocks=(
        Blocks(
            "layers",
            tokens="x",
            image="first",
            joint="first",
            follow=(Follow("attn_mask"), Follow("attention_mask"), Follow("freqs_cis")),
            attention=("attention",),
            mlp=("feed_forward",),
            modulated=modulation.zimage,
            width=Width(
                layers=(
                    *attention_layers("attention"),
                    *mlp_layers("feed_forward.w2", "feed_forward.w1", "feed_forward.w3"),
                ),
                inner="attention.to_out.0.in_features",
                hidden="feed_forward.w2.in_features",
                attention=("attention",),
                sliceable=runs_processor("attention", "ZSingleStreamAttnProcessor"),
            ),
        ),
    ),
    grid=_zimage_grid,
    level=timestep_level("t", scale=1.0, backwards=True),
    refuse={
        "controlnet_block_samples": CONTROL_REASON,
        "siglip_feats": IMAGE_PROMPT_REASON,
        "image_noise_mask": IMAGE_PROMPT_REASON,
    },
    width=lambda model: int(model.config["dim"]),  # type: ignore[index]
    heads=lambda model: int(model.config["n_heads"]),  # type: ignore[index]
    guidance="cond_first",
)


def _lumina_tokens(model: nn.Module, call: Arguments) -> ImageTokens:
    """Read the grid. A sample with a shorter text has its padding after the image, and is rotated by that."""
    mask: Tensor = call["encoder_attention_mask"]
    lengths: list[int] = mask.sum(dim=1).tolist()
    shorter = tuple(int(length) - int(max(lengths)) for length in lengths)
    return ImageTokens(patch_grid(model, call), rotation=shorter if any(shorter) else ())


LUMINA2 = ModelAdapter(
    name="Lumina 2",
    classes=("Lumina2Transformer2DModel",),
    blocks=(
        Blocks(
            "layers",
            image="last",
            follow=(Follow("attention_mask"), Follow("image_rotary_emb")),
            attention=("attn",),
            mlp=("feed_forward",),
            modulated=modulation.from_embedding,
            width=Width(
                layers=(
                    *attention_layers("attn"),
                    *mlp_layers("feed_forward.linear_2", "feed_forward.linear_1", "feed_forward.linear_3"),
                ),
                inner="attn.to_out.0.in_features",
                hidden="feed_forward.linear_2.in_features",
                attention=("attn",),
                sliceable=runs_processor("attn", "Lumina2AttnProcessor2_0"),
            ),
        ),
    ),
    grid=_lumina_tokens,
    read_ahead=("encoder_attention_mask",),
    level=timestep_level(scale=1.0, backwards=True),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    width=lambda model: int(model.config["hidden_size"]),  # type: ignore[index]
    guidance="calls",
)
