"""Adapters of diffusers models that keep text and image tokens in one sequence throughout: Z-Image and Lumina 2."""

from __future__ import annotations

from torch import Tensor, nn

from tokdyn.adapters import modulation
from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.readers import CONTROL_REASON, IMAGE_PROMPT_REASON, patch_grid, timestep_level
from tokdyn.adapters.width import Width, attention_layers, mlp_layers, runs_processor
from tokdyn.errors import InputError
from tokdyn.tokens import Grid, ImageTokens, cells

_MULTIPLE = 32
"""Z-Image pads the tokens of every text and image to a multiple of this."""


def _zimage_grid(model: nn.Module, call: Arguments) -> Grid | ImageTokens:
    latents = call["x"]
    several = isinstance(latents[0], list)
    sizes = {
        tuple(None if image is None else _zimage_cells(image, call) for image in (images if several else [images]))
        for images in latents
    }
    if len(sizes) > 1:
        raise InputError(
            f"the images in x have the sizes {sorted(map(str, sizes))} in tokens; call a wrapped "
            "ZImageTransformer2DModel with samples whose images have the same sizes."
        )
    *others, grid = sizes.pop()
    assert grid is not None
    if not several:
        return grid
    noisy = [0] * len(others) + [1]
    if any(list(mask) != noisy for mask in call["image_noise_mask"]):
        raise InputError(f"image_noise_mask must be {noisy} for every sample: the last image is the generated one.")
    references: list[Grid] = []
    for other in others:
        references += [other] if other else []
        padding = -cells(other) % _MULTIPLE if other else _MULTIPLE
        references += [(padding,)] if padding else []
    texts = [sum(-(-len(text) // _MULTIPLE) for text in sample) * _MULTIPLE for sample in call["cap_feats"]]
    return ImageTokens(grid, tuple(references), len(references), rotation=tuple(texts))


def _zimage_cells(image: Tensor, call: Arguments) -> Grid:
    frames, rows, columns = image.shape[-3:]
    size, duration = call.get("patch_size", 2), call.get("f_patch_size", 1)
    grid = (frames // duration, rows // size, columns // size)
    return grid[1:] if grid[0] == 1 else grid


def _zimage_told(call: Arguments) -> Arguments:
    """Put the generated image, the last of each sample, in place of the lists of images that it comes with."""
    images = call["x"]
    return {**call, "x": [each[-1] for each in images]} if isinstance(images[0], list) else call


ZIMAGE = ModelAdapter(
    name="Z-Image",
    classes=("ZImageTransformer2DModel",),
    blocks=(
        Blocks(
            "layers",
            tokens="x",
            image="first",
            joint="first",
            follow=(Follow("attn_mask"), Follow("attention_mask"), Follow("freqs_cis"), Follow("noise_mask")),
            rounds=("adaln_input", "adaln_noisy", "adaln_clean"),
            attention=("attention",),
            mlp=("feed_forward",),
            modulated=modulation.zimage,
            products=Products(rounds=("adaLN_modulation.*",)),
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
    told=_zimage_told,
    level=timestep_level("t", scale=1.0, backwards=True),
    refuse={"controlnet_block_samples": CONTROL_REASON},
    width=lambda model: int(model.config["dim"]),  # type: ignore[index]
    heads=lambda model: int(model.config["n_heads"]),  # type: ignore[index]
    guidance="cond_first",
)


def _lumina_grid(model: nn.Module, call: Arguments) -> Grid | ImageTokens:
    """Read the grid. Samples with a shorter text have padding after the image, by which they are rotated."""
    lengths = call["encoder_attention_mask"].sum(dim=1).tolist()
    shorter = tuple(int(length) - int(max(lengths)) for length in lengths)
    grid = patch_grid(model, call)
    return ImageTokens(grid, rotation=shorter) if any(shorter) else grid


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
    grid=_lumina_grid,
    read_ahead=("encoder_attention_mask",),
    level=timestep_level(scale=1.0, backwards=True),
    refuse={"attention_kwargs": IMAGE_PROMPT_REASON},
    width=lambda model: int(model.config["hidden_size"]),  # type: ignore[index]
    guidance="calls",
)
