"""Adapters of JoyImage Edit and Edit Plus, whose text and image streams meet in attention, the image first."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from tokdyn.adapters.base import Arguments, Blocks, Follow, ModelAdapter, Products
from tokdyn.adapters.readers import timestep_level
from tokdyn.adapters.width import SlicedLayer, Width, mlp_layers, runs_processor
from tokdyn.errors import InputError
from tokdyn.tokens import Grid, ImageTokens


def _joy_modulated(block: nn.Module, arguments: Arguments) -> Tensor:
    """Return the modulated image tokens of a block of JoyImage."""
    shift, scale = block.img_mod(arguments["temb"])[:2]  # type: ignore[operator]
    out: Tensor = block.img_norm1(arguments["hidden_states"]) * (1 + scale[:, None]) + shift[:, None]  # type: ignore[operator]
    return out


def _joy_tokens(model: nn.Module, call: Arguments) -> ImageTokens:
    """Return the grid of latents (B, C, frames, rows, columns), or (B, images, C, frames, rows, columns).

    Of several images the last is the generated one, whose tokens come first.
    """
    latents = call["hidden_states"]
    patch = model.config["patch_size"]  # type: ignore[index]
    grid = _flat(tuple(size // part for size, part in zip(latents.shape[-3:], patch, strict=True)))
    return ImageTokens(grid, (grid,) * (latents.shape[1] - 1 if latents.dim() == 6 else 0))


def _flat(grid: Grid) -> Grid:
    """Leave out the axis of frames if there is one."""
    return grid[1:] if grid[0] == 1 else grid


_JOY_BLOCKS = Blocks(
    "double_blocks",
    text="encoder_hidden_states",
    returns=("tokens", "text"),
    joint="first",
    follow=(Follow("image_rotary_emb", axis=0, batched=False, item=0),),
    attention=("attn",),
    mlp=("img_mlp",),
    modulated=_joy_modulated,
    products=Products(text=("*.txt_*", "txt_*")),
    width=Width(
        layers=(
            *(SlicedLayer(f"attn.{stream}_attn_qkv", out=("heads",)) for stream in ("img", "txt")),
            *(SlicedLayer(f"attn.{stream}_attn_proj", into=("heads",)) for stream in ("img", "txt")),
            *mlp_layers("img_mlp.net.2", "img_mlp.net.0.proj"),
        ),
        inner="attn.img_attn_proj.in_features",
        hidden="img_mlp.net.2.in_features",
        attention=("attn",),
        sliceable=runs_processor("attn", "JoyImageAttnProcessor", "JoyImageEditPlusAttnProcessor"),
    ),
)

JOYIMAGE = ModelAdapter(
    name="JoyImage Edit",
    classes=("JoyImageEditTransformer3DModel",),
    blocks=(_JOY_BLOCKS,),
    grid=_joy_tokens,
    level=timestep_level(),
    width=lambda model: int(model.config["hidden_size"]),  # type: ignore[index]
    guidance="calls",
)


def _joy_plus_tokens(model: nn.Module, call: Arguments) -> ImageTokens:
    """Return the grids of the images of every sample, of which `shape_list` has frames, rows and columns.

    The first is the generated one.
    """
    shapes = {tuple(map(tuple, images)) for images in call["shape_list"]}
    if len(shapes) > 1:
        raise InputError(
            f"shape_list holds other sizes for some samples than for others, {sorted(shapes)}; call a wrapped "
            "JoyImageEditPlusTransformer3DModel with samples whose images and reference images have the same sizes."
        )
    grid, *references = map(_flat, shapes.pop())
    return ImageTokens(grid, tuple(references))


JOYIMAGE_PLUS = replace(
    JOYIMAGE,
    name="JoyImage Edit Plus",
    classes=("JoyImageEditPlusTransformer3DModel",),
    blocks=(replace(_JOY_BLOCKS, follow=(Follow("image_rotary_emb"), Follow("attention_mask", axis=3))),),
    grid=_joy_plus_tokens,
    guidance="uncond_first",
)
